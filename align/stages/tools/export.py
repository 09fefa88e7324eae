"""Export a model: write it aside, verify it against the source, and rename it into place."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.core.artifacts import read_json_object
from align.core.errors import EXIT_OK, AlignError, ArtifactError, TrainingError
from align.core.model_card import CARD, stage_card
from align.core.readers import Reading
from align.core.serving import COMMAND, installed_command, serve_line
from align.core.text import visible
from align.core.types import Text
from align.export import llama_cpp
from align.export.folder import new_folder, write_record
from align.export.gguf import FILE, TYPES, write_gguf
from align.export.ollama import MODELFILE, modelfile
from align.export.parity import (
    NEW_TOKENS,
    PROMPTS,
    Behavior,
    Parity,
    Probe,
    compare_reading,
    probe_of,
)
from align.export.source import Source, base_model, find_place, find_source, require_weights
from align.export.verify import Format, source_behavior, verify
from align.export.weights import write_adapter, write_merged
from align.models.loading import load_tokenizer
from align.sampling.build import vllm_obstacle
from align.sampling.vllm_reading import read_by_vllm
from align.tuning.files import CONFIG as ADAPTER_CONFIG

DTYPES = {"model": ("bfloat16", "float16", "float32"), "gguf": TYPES}
DEFAULT_DTYPE = {"model": "bfloat16", "gguf": "q8_0"}


def export(
    reference: Path,
    out: Path,
    *,
    name: str = "model",
    dtype: str | None = None,
    base: str | None = None,
    prompts: Sequence[Text] = (),
    force: bool = False,
    readers: str = "transformers",
) -> list[str]:
    """Export a model and return what to print: the comparison, and how to serve the result.

    Args:
        reference: ``RUN/STAGE`` or a model folder. out: the new folder.
        name: ``model``, ``adapter`` or ``gguf``. dtype: dtype of the weights.
        base: name of an adapter's base model; None uses the one its stage started from.
        prompts: prompts to compare on; default: a fixed list.
        force: replace an earlier export in ``out``.
        readers: ``transformers``; ``vllm`` or ``llama.cpp`` too, which must be able to read the
            export; ``auto``: the one of the two that reads the format, if it can.

    Raises:
        ArtifactError: nothing was written, for the reason in the message.
    """
    source = find_source(reference)
    require_weights(source.model_dir, (".safetensors",))
    _refuse_overlap(source, out)
    form = _format(source, name, dtype=dtype, base=base)
    probe = probe_of(source.model_dir, prompts)
    # The folder gets its name at the end: an export that differs from its source leaves none.
    with new_folder(out, force=force) as folder:
        notes = _write(source, folder, form)
        (folder / CARD).write_text(_card(source, folder, form), encoding="utf-8")
        about = _about(source, form)
        write_record(folder, about)
        original = source_behavior(source, probe)
        parity = verify(source, folder, form, probe=probe, original=original)
        compared = {"parity": asdict(parity)}
        read, told = _read(source, folder, form, probe=probe, original=original, readers=readers)
        if read is not None:
            program = "llama_cpp" if form.name == "gguf" else "vllm"
            compared[f"parity_{program}"] = asdict(read)
        write_record(folder, {**about, **compared})
    result = f"{out}: {_result(source, form, parity)}"
    notes = [*told, *notes]
    own = {"ollama": (out / MODELFILE).is_file(), "command": installed_command()}
    return [result, *probe.notes, *notes, *_serve_lines(source, out, form, **own)]


def _read(
    source: Source, folder: Path, form: Format, *, probe: Probe, original: Behavior, readers: str
) -> tuple[Parity | None, list[str]]:
    """Return how another program's reading of an export differs, and the lines for the user.

    Raises:
        ArtifactError: it differs from the source, or the program is asked for and cannot read it.
    """
    if readers == "transformers":
        return None, []
    program = "llama.cpp" if form.name == "gguf" else "vLLM"
    unfit = source.kind != "policy" or form.name == "adapter"
    if unfit:
        obstacle = "only policies as --format model or gguf are"
    elif readers not in ("auto", program.lower()):
        obstacle = f"--format {form.name} is read by {program}"
    else:
        obstacle = llama_cpp.obstacle() if form.name == "gguf" else vllm_obstacle(folder)
    if obstacle is None:
        try:
            readings, problems = _readings(source, folder, form, probe=probe)
        except TrainingError as error:
            obstacle = str(error).removeprefix(f"{folder}: ")
        else:
            parity, found = compare_reading(original, readings, probe, bound=form.bound)
            if problems := [*problems, *found]:
                raise ArtifactError(
                    f"{source.model_dir}: {program} reads another model from the export: "
                    f"{'; '.join(problems[:3])}. If the original differs from transformers in "
                    f"{program} too, export with --verify transformers"
                )
            return parity, [f"read by {program}: {parity.line()}"]
    if readers != "auto":
        raise ArtifactError(f"--verify {readers}: not compared: {obstacle}. Nothing was written")
    return None, [] if unfit else [f"not compared with {program}: {obstacle}"]


def _readings(
    source: Source, folder: Path, form: Format, *, probe: Probe
) -> tuple[Sequence[Reading], list[str]]:
    """Return the other program's responses, and one line for each text that it splits otherwise."""
    if form.name != "gguf":
        return read_by_vllm(folder, probe.prompts, max_new_tokens=NEW_TOKENS), []
    read = llama_cpp.read_by_llama_cpp(
        folder / FILE, probe.prompts, PROMPTS, max_new_tokens=NEW_TOKENS
    )
    tokenizer = load_tokenizer(source.model_dir)
    ours = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    pairs = zip(PROMPTS, ours, read.tokens, strict=True)
    return read.responses, [
        f"{text!r} has the tokens {theirs[:8]}, expected {expected[:8]}"
        for text, expected, theirs in pairs
        if theirs != expected
    ]


def _format(source: Source, name: str, *, dtype: str | None, base: str | None) -> Format:
    if name == "adapter":
        if dtype is not None:
            raise ArtifactError("--dtype: an adapter keeps its dtype. Remove --dtype")
        found = base_model(source)[0] if base is None and source.adapter_dir else base
        # The merged weights of the stage were rounded to its dtype, the adapter was not.
        config = read_json_object(source.model_dir / "config.json") or {}
        return Format(name, str(config.get("dtype") or "float32"), found)
    dtype = dtype or DEFAULT_DTYPE[name]
    if dtype not in DTYPES[name]:
        raise ArtifactError(
            f"--dtype {dtype}: --format {name} has {', '.join(DTYPES[name])}. Choose one of them"
        )
    if base is not None:
        raise ArtifactError("--base names the base of an adapter. Use it with --format adapter")
    return Format(name, dtype)


def _refuse_overlap(source: Source, out: Path) -> None:
    place, taken = out.resolve(), (source.artifact or source.model_dir).resolve()
    if place == taken or taken in place.parents or place in taken.parents:
        raise ArtifactError(f"{out}: overlaps the exported model's folder {taken}. Choose another")


def _write(source: Source, folder: Path, form: Format) -> list[str]:
    """Write an export's files; return notes for the user."""
    if form.name == "adapter":
        write_adapter(source, folder, base=form.base)
    elif form.name == "gguf":
        write_gguf(source, folder, kind=form.dtype)
        text = modelfile(source.model_dir, FILE)
        if text is None:
            return [
                f"{MODELFILE}: not written: the chat template is more than fixed texts around "
                "messages, which Ollama's templates cannot express. Write TEMPLATE by hand"
            ]
        (folder / MODELFILE).write_text(text, encoding="utf-8")
    else:
        write_merged(source, folder, dtype=form.dtype)
    return []


def _card(source: Source, folder: Path, form: Format) -> str:
    """Return the README of an export: the stage's card, and the commands that serve the folder."""
    card = f"# {source.name}\n"
    if source.artifact is not None:
        card = stage_card(source.artifact, source.manifest)
    ollama = (folder / MODELFILE).is_file()
    # The folder will be elsewhere, and read by others, whose vLLM is unknown.
    lines = _serve_lines(source, Path(), form, ollama=ollama, command=COMMAND)
    commands = "\n".join(lines)
    return f"{card}\n## Serve\n\nIn this folder:\n\n```sh\n{commands}\n```\n"


def _about(source: Source, form: Format) -> dict[str, Any]:
    return {
        "name": source.name,
        "kind": source.kind,
        "format": form.name,
        "dtype": form.dtype,
        "base": form.base,
        "spec_hash": source.manifest.get("spec_hash"),
    }


def _result(source: Source, form: Format, parity: Parity) -> str:
    if source.kind != "policy":
        return f"verified: scores differ by at most {parity.kl_max:.2g} standard deviations"
    return f"verified in {form.dtype}: {parity.line()}"


def _serve_lines(
    source: Source, place: Path, form: Format, *, ollama: bool, command: str
) -> list[str]:
    """Return the commands that serve an export in a folder, which may have an Ollama Modelfile."""
    if form.name == "gguf":
        lines = [shlex.join(["llama-server", "-m", str(place / FILE)])]
        words = ["ollama", "create", source.name, "-f", str(place / MODELFILE)]
        return lines + ([shlex.join(words)] if ollama else [])
    if form.name == "adapter":
        settings = read_json_object((source.adapter_dir or place) / ADAPTER_CONFIG) or {}
        if settings.get("trainable_token_indices"):
            return ["# peft loads it; vLLM has no trained rows in an adapter: use --format model"]
        options = ("--enable-lora", "--lora-modules", f"{source.name}={place}")
        return [serve_line(str(form.base), *options, command=command)]
    named = ("--served-model-name", source.name)
    pooling = () if source.kind == "policy" else ("--runner", "pooling")
    return [serve_line(place, *named, *pooling, command=command)]


def _read_prompts(path: Path | None) -> list[Text]:
    if path is None:
        return []
    from align.data.load import load_examples
    from align.recipe.schema import DataSpec

    examples = load_examples([DataSpec(path=str(path))], kind="prompts", seed=0)
    return [example.prompt for example in examples]


def main() -> None:
    """Export the model named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference")
    parser.add_argument("out", type=Path)
    parser.add_argument("--format", choices=["model", "adapter", "gguf"], default="model")
    parser.add_argument("--dtype")
    parser.add_argument("--base")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument(
        "--verify", choices=["auto", "transformers", "vllm", "llama.cpp"], default="auto"
    )
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args()
    try:
        lines = export(
            find_place(args.reference, args.runs),
            args.out,
            name=args.format,
            dtype=args.dtype,
            base=args.base,
            prompts=_read_prompts(args.prompts),
            force=args.force,
            readers=args.verify,
        )
    except AlignError as error:
        sys.stderr.write(visible(f"{error}\n"))
        sys.exit(error.exit_code)
    sys.stdout.write(visible("\n".join(lines) + "\n"))
    sys.exit(EXIT_OK)


if __name__ == "__main__":
    main()
