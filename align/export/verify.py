"""The parity gate: an export is done only if it is the source, file by file and word by word."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.core.artifacts import read_json_object
from align.core.errors import ArtifactError
from align.export.folder import changed_files
from align.export.gguf import FILE, apply_rope_factors, gguf_problems
from align.export.parity import (
    BOUNDS,
    Behavior,
    Bound,
    Parity,
    Probe,
    behavior,
    compare,
    parity_problems,
)
from align.export.source import Source
from align.export.weights import weight_problems
from align.models.bringing import one_line
from align.models.loading import load_tokenizer, stop_token_ids
from align.tuning.files import CONFIG, with_adapter, with_saved_adapter
from align.tuning.loading import load_classifier, load_reward_model
from reward_models.scalar import exact_attention

SHOWN = 5
"""Differences that a message lists."""
TEXTS = ("Hello world, 123!", "  two  spaces\n\n\ttab", "Ünïcødé 中文 😀", "<|im_end|></s>")


@dataclass(frozen=True, slots=True)
class Format:
    """What an export contains.

    Attributes:
        name: ``model``, ``adapter`` or ``gguf``. dtype: dtype of its weights.
        base: model folder or hub id to which an adapter is added.
    """

    name: str
    dtype: str
    base: str | None = None

    @property
    def bound(self) -> Bound:
        """Return the largest differences that the format explains."""
        return BOUNDS[self.dtype]


def source_behavior(source: Source, probe: Probe) -> Behavior:
    """Return the behavior of the model to export, in float32."""
    with one_line(str(source.model_dir), f"a {source.kind}"):
        if source.kind != "policy":
            return _scores(source.kind, source.model_dir, probe, exported=False)
        model = with_adapter(_policy(source.model_dir), source.model_dir)
    return behavior(model.eval(), probe)


def verify(
    source: Source, folder: Path, form: Format, *, probe: Probe, original: Behavior
) -> Parity:
    """Compare an exported folder with its source.

    Args:
        source: the exported model. folder: the folder with its record. form: what it contains.
        probe: token rows to compare on. original: the source's behavior on them.

    Raises:
        ArtifactError: they differ by more than the format explains; the message says where.
    """
    problems = [*changed_files(folder), *_file_problems(source, folder, form)]
    _refuse(source, problems)
    # Whatever a damaged file does to a loader becomes one line.
    with one_line(str(folder), f"an exported {source.kind}"):
        if source.kind != "policy":
            exported = _scores(source.kind, folder, probe, exported=True)
            return _compared_scores(source, original, exported, form=form)
        model = _exported_policy(source, folder, form)
        if form.name == "gguf":
            _refuse(source, list(gguf_problems(source, folder, model, row=form.bound.row)))
        exported = behavior(model, probe, original.responses)
    _refuse(source, list(parity_problems(original, exported, probe, bound=form.bound)))
    return compare(original, exported, probe)


def _refuse(source: Source, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ArtifactError(
            f"{source.model_dir}: the export is not this model: {'; '.join(problems[:SHOWN])}{more}"
            ". Export again; if that fails too, report it with the versions of 'align doctor'"
        )


def _file_problems(source: Source, folder: Path, form: Format) -> Iterator[str]:
    """Yield one line for each weight, setting or token that differs from the source's."""
    if form.name == "gguf":
        if not (folder / FILE).is_file():
            yield f"{FILE}: missing"
        return
    if form.name == "adapter":
        assert source.adapter_dir is not None
        yield from weight_problems(source.adapter_dir, folder, dtype=None)
        yield from _config_problems(
            source.adapter_dir / CONFIG, folder / CONFIG, apart={"base_model_name_or_path"}
        )
        found = (read_json_object(folder / CONFIG) or {}).get("base_model_name_or_path")
        if found != form.base:
            yield f"{CONFIG}: base_model_name_or_path is {found!r}, expected {form.base!r}"
    else:
        yield from weight_problems(source.model_dir, folder, dtype=form.dtype)
        for path in sorted(source.model_dir.glob("*config.json")):
            apart = {"dtype", "torch_dtype"} if path.name == "config.json" else set()
            yield from _config_problems(path, folder / path.name, apart=apart)
    yield from _tokenizer_problems(source.model_dir, folder)


def _config_problems(expected: Path, found: Path, *, apart: set[str]) -> Iterator[str]:
    ours, theirs = read_json_object(expected) or {}, read_json_object(found)
    if theirs is None:
        yield f"{found.name}: missing or no JSON object"
        return
    for key in sorted((ours.keys() | theirs.keys()) - apart):
        if ours.get(key) != theirs.get(key):
            shown = [json.dumps(x.get(key))[:40] for x in (theirs, ours)]
            yield f"{found.name}: {key} is {shown[0]}, expected {shown[1]}"


def _tokenizer_problems(expected: Path, folder: Path) -> Iterator[str]:
    try:
        ours, theirs = load_tokenizer(expected), load_tokenizer(folder)
    # transformers and tokenizers raise many types for damaged files.
    except Exception as error:
        yield f"tokenizer: cannot be loaded: {' '.join(str(error).split())[:200]}"
        return
    if ours.get_vocab() != theirs.get_vocab():
        yield "tokenizer: its vocabulary differs from the source's"
    if ours.chat_template != theirs.chat_template:
        yield "tokenizer: its chat template differs from the source's"
    if ours.special_tokens_map != theirs.special_tokens_map:
        yield "tokenizer: its special tokens differ from the source's"
    if any(ours(text)["input_ids"] != theirs(text)["input_ids"] for text in TEXTS):
        yield "tokenizer: it splits text into other tokens than the source's"
    stops = (expected / "generation_config.json").is_file()
    if stops and (folder / "generation_config.json").is_file():
        found = stop_token_ids(folder)
        if found != stop_token_ids(expected):
            yield f"stop tokens: {found}, expected {stop_token_ids(expected)}"


def _exported_policy(source: Source, folder: Path, form: Format) -> nn.Module:
    if form.name == "adapter":
        assert form.base is not None
        return with_saved_adapter(_policy(form.base), folder).eval()
    if form.name == "gguf":
        model = _policy(folder, gguf_file=FILE)
        apply_rope_factors(model, folder)
        return model
    return _policy(folder)


def _policy(path: Path | str, **options: object) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=False, **options)
    # In float32, so that only the rounding of the weights counts.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(path),
        dtype=torch.float32,
        attn_implementation=exact_attention(config),
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ArtifactError(f"{path}: no weights for {', '.join(missing[:3])}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.inference_mode()
def _scores(kind: str, folder: Path, probe: Probe, *, exported: bool) -> Behavior:
    """Return the scores of rows that end with a stop token, as log-probabilities' stand-in."""
    stop = probe.stop_token_ids[0]
    rows = [[t for t in row if t != probe.pad_token_id] + [stop] for row in probe.rows]
    rows += [[*row, stop] for row in probe.prompts]
    config = read_json_object(folder / "config.json") or {}
    plain = "ForSequenceClassification" in str(config.get("architectures"))
    # An export is read as other tools read it.
    own = kind == "reward_model" and not (plain and exported)
    model: Any = load_reward_model(folder) if own else load_classifier(folder)
    found: list[Tensor] = []
    for row in rows:
        ids = torch.tensor([row])
        last = model(ids)[0, -1] if own else model(ids).logits[0]
        found.append(last.float().reshape(-1))
    return Behavior([], found)


def _compared_scores(
    source: Source, original: Behavior, exported: Behavior, *, form: Format
) -> Parity:
    """Return the differences of scores, relative to their standard deviation."""
    ours, theirs = torch.stack(list(original.logprobs)), torch.stack(list(exported.logprobs))
    scale = ours.std(0).clamp(min=1e-6)
    worst = float(((ours - theirs).abs() / scale).max())
    limit = max(form.bound.tie, 1e-3)
    if not worst <= limit:
        _refuse(source, [f"scores differ by {worst:.3g} standard deviations, at most {limit:g}"])
    return Parity(worst, worst, len(ours), len(ours))
