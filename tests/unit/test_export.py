"""Exports: the same model in other formats, and planted faults that must not pass."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from export_models import edit, make_run, policy, save, tokenizer

from align.core.errors import ArtifactError
from align.export import weights
from align.export.folder import RECORD, is_export, new_folder, write_record
from align.export.parity import (
    BOUNDS,
    Behavior,
    Probe,
    Reading,
    compare,
    compare_reading,
    parity_problems,
    probe_of,
)
from align.export.source import find_place, find_source
from align.export.verify import Format, source_behavior, verify
from align.stages.tools import export as tools
from align.stages.tools.export import export

WEIGHTS = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        export(run / "sft", folder / "model", dtype="float32")
        export(run / "sft", folder / "bfloat16", dtype="bfloat16")
        export(run / "sft", folder / "adapter", name="adapter")
        patch.setattr(weights, "SHARD_BYTES", 100_000)
        export(run / "sft", folder / "sharded", dtype="float32")
    return folder


@pytest.fixture(scope="module")
def original(run) -> tuple[Probe, Behavior]:
    source = find_source(run / "sft")
    probe = probe_of(source.model_dir)
    return probe, source_behavior(source, probe)


def change(name: str, edit_tensor: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        state[name] = edit_tensor(state[name].clone()).contiguous()
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def lost_adapter(folder: Path) -> None:
    save_file(policy().state_dict(), folder / WEIGHTS, metadata={"format": "pt"})


def doubled_adapter(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    state = {n: 2 * t if "lora_B" in n else t for n, t in load_file(path).items()}
    save_file(state, path)


def rounded(folder: Path) -> None:
    state = {n: t.to(torch.bfloat16).float() for n, t in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def rounded_twice(folder: Path) -> None:
    kind = torch.float8_e4m3fn
    state = {n: t.to(kind).to(t.dtype) for n, t in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def zero_last_row(weight: Tensor) -> Tensor:
    weight[300] = 0.0
    return weight


def nan_somewhere(weight: Tensor) -> Tensor:
    weight[3, 5] = torch.nan
    return weight


def permuted(weight: Tensor) -> Tensor:
    return weight.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)


def stale_shard(folder: Path) -> None:
    save_file({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}, folder / "old.safetensors")


def no_head(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    del state["lm_head.weight"]
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    edit(folder / "config.json", tie_word_embeddings=True)


def other_template(folder: Path) -> None:
    found = tokenizer()
    found.chat_template = str(found.chat_template).replace("\n", " ")
    found.save_pretrained(folder)


FAULTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "lost adapter": ("model", lost_adapter, r"q_proj\.weight: \d+ of 64 rows differ"),
    "wrong scale": (
        "adapter",
        lambda f: edit(f / "adapter_config.json", lora_alpha=16),
        "lora_alpha is 16, expected 8",
    ),
    "doubled adapter": ("adapter", doubled_adapter, "lora_B"),
    "wrong base": (
        "adapter",
        lambda f: edit(f / "adapter_config.json", base_model_name_or_path="org/other"),
        "base_model_name_or_path is 'org/other'",
    ),
    "tied head": ("model", no_head, r"lm_head\.weight: missing.*tie_word_embeddings is true"),
    "head of the embeddings": (
        "model",
        lambda f: change("lm_head.weight", lambda _: policy().model.embed_tokens.weight.detach())(
            f
        ),
        r"lm_head\.weight: 320 of 320 rows differ",
    ),
    "transposed weight": ("model", change(Q, lambda w: w.T), "64 of 64 rows differ"),
    "missing shard": (
        "sharded",
        lambda f: next(iter(sorted(f.glob("model-*")))).unlink(),
        "missing, but model.safetensors.index.json names it",
    ),
    "rounded weights": ("model", rounded, "rows differ"),
    "rounded beyond the dtype": ("bfloat16", rounded_twice, "rows differ"),
    "wrong dtype": (
        "model",
        change(Q, lambda w: w.to(torch.bfloat16)),
        "dtype torch.bfloat16, expected torch.float32",
    ),
    "wrong stop token": (
        "model",
        lambda f: edit(f / "generation_config.json", eos_token_id=[0]),
        r"eos_token_id is \[0\], expected \[2, 0\]",
    ),
    "wrong template": ("model", other_template, "chat template differs"),
    "tokenizer of another model": (
        "adapter",
        lambda f: tokenizer(seed=5).save_pretrained(f),
        "vocabulary differs",
    ),
    "permuted rotary heads": ("model", change(Q, permuted), r"q_proj\.weight: \d+ of 64 rows"),
    "dropped embedding row": (
        "model",
        change("model.embed_tokens.weight", zero_last_row),
        "embed_tokens.weight: 1 of 320 rows differ",
    ),
    "NaN": ("model", change(Q, nan_somewhere), "contains NaN or infinity"),
    "stale file": ("model", stale_shard, "not a weight of the source"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_refused(run, exported, original, tmp_path, name):
    made, damage, told = FAULTS[name]
    folder = tmp_path / "export"
    shutil.copytree(exported / made, folder)
    damage(folder)
    # A new record: the fault was made by the export itself, not afterwards.
    about = json.loads((folder / RECORD).read_text())
    write_record(folder, {k: v for k, v in about.items() if k not in ("files", "written_by")})
    form = Format(about["format"], about["dtype"], about["base"])
    probe, behavior = original
    with pytest.raises(ArtifactError, match=told):
        verify(find_source(run / "sft"), folder, form, probe=probe, original=behavior)


@pytest.mark.parametrize("made", ["model", "bfloat16", "adapter", "sharded"])
def test_sound_export_passes_and_a_later_change_does_not(run, exported, original, tmp_path, made):
    folder = tmp_path / "export"
    shutil.copytree(exported / made, folder)
    about = json.loads((folder / RECORD).read_text())
    form = Format(about["format"], about["dtype"], about["base"])
    probe, behavior = original
    found = verify(find_source(run / "sft"), folder, form, probe=probe, original=behavior)
    assert found.kl_max <= BOUNDS[form.dtype].kl
    (folder / "notes.txt").write_text("later")
    with pytest.raises(ArtifactError, match=r"notes\.txt: not part of the export"):
        verify(find_source(run / "sft"), folder, form, probe=probe, original=behavior)


def test_merged_export_is_base_plus_adapter(run, exported):
    # W + (alpha / r) B A by hand, from the files of the adapter and of the base.
    base = load_file(run / "base" / "model" / WEIGHTS)[Q]
    adapter = load_file(exported / "adapter" / "adapter_model.safetensors")
    stem = f"base_model.model.{Q.removesuffix('.weight')}"
    a, b = adapter[f"{stem}.lora_A.weight"], adapter[f"{stem}.lora_B.weight"]
    found = load_file(exported / "model" / WEIGHTS)[Q]
    assert found.numpy() == pytest.approx((base + 2.0 * b @ a).numpy(), abs=1e-5)


def test_adapter_names_the_imported_base(run, exported):
    config = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run / "imported")


def test_adapter_with_trained_rows_gets_no_line_that_vllm_would_refuse(run, tmp_path):
    (tmp_path / "adapter").mkdir()
    source = replace(find_source(run / "sft"), artifact=tmp_path)
    form = Format("adapter", "float32", "org/base")
    told = {}
    for rows in (None, [], [3], {"embed_tokens": [3]}):
        config = {"trainable_token_indices": rows}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        (told[str(rows)],) = tools._serve_lines(
            source, tmp_path, form, ollama=False, command="vllm serve"
        )
    assert all("--enable-lora" in told[rows] for rows in ("None", "[]"))
    assert all("--format model" in told[rows] for rows in ("[3]", "{'embed_tokens': [3]}"))
    assert all(told[rows].startswith("# ") for rows in ("[3]", "{'embed_tokens': [3]}"))


def test_adapter_on_another_base_is_refused_by_its_behavior(run, tmp_path):
    save(policy(seed=7), tmp_path / "other")
    with pytest.raises(ArtifactError, match="per-token KL is up to"):
        export(run / "sft", tmp_path / "out", name="adapter", base=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_per_token_kl_by_hand():
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3 = 0.143841
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    probe = Probe([[1]], [], [0], 0)
    found = compare(Behavior([[1]], [p]), Behavior([[1]], [q]), probe)
    assert found.kl_max == pytest.approx(0.143841, abs=1e-6)
    lost = compare(Behavior([[1]], [p]), Behavior([[1]], [q * torch.nan]), probe)
    assert lost.kl_max == float("inf")


@pytest.mark.parametrize(("gap", "refused"), [(0.04, False), (0.06, True)])
def test_greedy_responses_may_differ_only_at_a_tie(gap, refused):
    # The original prefers token 1 by ``gap`` nats; the export says token 0.
    logprobs = torch.tensor([[0.0, gap]]).log_softmax(-1)
    ours, theirs = Behavior([[1]], [logprobs]), Behavior([[0]], [logprobs])
    told = list(parity_problems(ours, theirs, Probe([[1]], [], [9], 9), bound=BOUNDS["f16"]))
    assert bool(told) is refused


def test_failed_export_leaves_an_earlier_one_unchanged(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(run / "sft", out, dtype="float32")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ArtifactError, match="already contains an export"):
        export(run / "sft", out)
    monkeypatch.setattr(weights, "rounded", lambda tensor, kind: 2 * tensor.to(kind))
    with pytest.raises(ArtifactError, match="the export is not this model"):
        export(run / "sft", out, dtype="bfloat16", force=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_folder_of_others_is_never_replaced(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(ArtifactError, match="align export did not write it"):
        export(run / "sft", tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    for out in (run / "sft", run / "sft" / "model", run):
        with pytest.raises(ArtifactError, match="overlaps"):
            export(run / "sft", out, force=True)


@pytest.mark.parametrize("added", ["notes.md", "logs/run.txt", "link"])
def test_force_keeps_files_that_the_user_added(run, tmp_path, added):
    out = tmp_path / "out"
    export(run / "sft", out, dtype="float32")
    (out / added).parent.mkdir(exist_ok=True)
    (out / added).symlink_to(tmp_path) if added == "link" else (out / added).write_text("mine")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(ArtifactError, match=f"did not write: {added}. Nothing was changed"):
        export(run / "sft", out, force=True)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    (out / added).unlink()
    export(run / "sft", out, dtype="float32", force=True)


def test_force_keeps_files_that_the_user_edited(tmp_path):
    out = tmp_path / "out"
    names = ("README.md", "chat_template.jinja", "config.json", "model.gguf")
    with new_folder(out, force=False) as folder:
        for name in names:
            (folder / name).write_text(f"written {name}")
        write_record(folder, {})
    # Another text of the same length, an emptied file, and one that is only touched.
    (out / "README.md").write_text("WRITTEN README.md")
    (out / "config.json").write_text("")
    (out / "model.gguf").write_text("written model.gguf")
    told = "changed since the export: README.md, config.json. Nothing was changed"
    with pytest.raises(ArtifactError, match=told), new_folder(out, force=True):
        raise AssertionError
    assert (out / "README.md").read_text() == "WRITTEN README.md"
    for name in ("README.md", "config.json"):
        (out / name).write_text(f"written {name}")
    with new_folder(out, force=True) as folder:
        write_record(folder, {})
    assert [p.name for p in out.iterdir()] == [RECORD]


def test_the_current_folder_is_never_replaced(run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "..", "../here", "/", str(tmp_path)):
        with pytest.raises(ArtifactError, match=r"contains the current folder|overlaps") as error:
            export(run / "sft", Path(out), force=True)
        assert len(str(error.value).splitlines()) == 1
    export(run / "sft", Path("../here/new"), dtype="float32")
    assert is_export(tmp_path / "here" / "new")


def test_prompts_that_are_not_compared_are_told(run, tmp_path):
    # 256 positions, of which 24 are for the response: 232 tokens at most, one per "~".
    model_dir = run / "sft" / "model"
    fits, beyond = ("~" * n for n in (232, 233))
    probe = probe_of(model_dir, [fits, beyond, ""])
    assert [len(row) for row in probe.prompts] == [232]
    lines = export(run / "sft", tmp_path / "out", dtype="float32", prompts=[fits, beyond, ""])
    assert "1 of 1 greedy responses" in lines[0]
    assert lines[1].startswith("not compared: 2 of 3 prompts: empty, or longer than 232 tokens")
    many = probe_of(model_dir, [f"{i}" for i in range(70)])
    assert (len(many.prompts), many.notes) == (64, ["compared: the first 64 of 70 prompts"])
    with pytest.raises(ArtifactError, match="none of 2 prompts can be compared: each is empty, or"):
        export(run / "sft", tmp_path / "none", prompts=[beyond, beyond])
    assert not (tmp_path / "none").exists()
    assert probe_of(model_dir).notes == []


def test_killed_export_is_cleaned_up_by_the_next(tmp_path):
    with pytest.raises(IsADirectoryError), new_folder(tmp_path / "out", force=False) as folder:
        folder.read_text()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("x")
    with new_folder(tmp_path / "out", force=False) as folder:
        write_record(folder, {})
    assert is_export(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [RECORD]


def test_every_form_of_a_model_is_found(run, exported, tmp_path, monkeypatch):
    from huggingface_hub import constants

    # The layout of the hub client's cache: refs/<branch> names the folder of a commit.
    cache, commit = tmp_path / "cache" / "models--org--tiny", "0" * 40
    shutil.copytree(run / "imported", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    lines = export(find_place("org/tiny", Path("runs")), Path("out"), dtype="float32")
    assert lines[-1].endswith(" out --served-model-name tiny")
    assert find_place(f"{run.name}/sft", run.parent) == run / "sft"
    assert find_place(str(run / "imported"), Path("runs")) == run / "imported"
    # An export needs no config.json: a GGUF file has its own.
    assert find_place("out", Path("runs")) == Path("out")
    with pytest.raises(ArtifactError, match="org/other: no such folder, and it cannot be loaded"):
        find_place("org/other", Path("runs"))
    with pytest.raises(ArtifactError, match="no such model; expected RUN/STAGE"):
        find_place("./nowhere", Path("runs"))


def test_the_readme_serves_the_folder_that_it_is_in(run, exported):
    base = run / "imported"
    for made, command in (
        ("model", "vllm serve . --served-model-name {name}-sft"),
        ("adapter", "vllm serve {base} --enable-lora --lora-modules {name}-sft=."),
    ):
        card = (exported / made / "README.md").read_text()
        expected = command.format(name=run.name, base=base)
        assert card.endswith(f"## Serve\n\nIn this folder:\n\n```sh\n{expected}\n```\n")
        assert str(exported) not in card


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "int8"}, "bfloat16, float16, float32"),
        ({"base": "org/base"}, "--format adapter"),
        ({"name": "adapter", "dtype": "float16"}, "keeps its dtype"),
        ({"name": "gguf", "dtype": "float16"}, "f16, q8_0, q4_k_m"),
    ],
)
def test_wrong_options_are_one_line(run, tmp_path, options, told):
    with pytest.raises(ArtifactError, match=told):
        export(run / "sft", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_plain_model_folder_has_no_adapter(run, tmp_path):
    with pytest.raises(ArtifactError, match="no adapter"):
        export(run / "imported", tmp_path / "out", name="adapter")
    with pytest.raises(ArtifactError, match="no finished stage and no model folder"):
        export(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_commands_of_the_page_export_a_run(tmp_path):
    make_run(tmp_path / "runs" / "quickstart").rename(tmp_path / "runs" / "quickstart" / "dpo")
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    commands = re.findall(r"^align export (.*?)\s*(?:#.*)?$", page, re.M)
    assert len(commands) == 4
    for command in commands:
        if "gguf" in command and find_spec("gguf") is None:
            continue
        argv = [sys.executable, "-m", "align", "export", *shlex.split(command)]
        done = subprocess.run(argv, cwd=tmp_path, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "verified" in done.stdout
        assert "vllm" in done.stdout or "llama-server" in done.stdout


def test_another_program_that_reads_another_model_is_named():
    # Two prompts of two tokens, over three tokens; token 2 ends a response.
    table = torch.tensor(
        [[0.2, 0.2, 0.6], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]], dtype=torch.float64
    ).log()
    original = Behavior([[0, 2], [0, 2]], [table, table])
    probe = Probe([[1, 1], [0, 1]], [], [2], 2)
    tops = [{0: math.log(0.7), 1: math.log(0.2)}, {2: math.log(0.8), 0: math.log(0.1)}]
    right: Reading = ([0, 2], tops)
    parity, problems = compare_reading(original, [right, right], probe, bound=BOUNDS["float32"])
    assert problems == []
    assert (parity.same_text, parity.prompts, parity.kl_max) == (2, 2, pytest.approx(0, abs=1e-9))
    # A program that does not stop at token 2.
    longer: Reading = ([0, 2, 1], [*tops, {1: math.log(0.3)}])
    _, problems = compare_reading(original, [right, longer], probe, bound=BOUNDS["q4_k_m"])
    assert problems == ["prompt 2: the response has 3 tokens, expected 2"]
    other: Reading = ([1, 2], tops)
    _, problems = compare_reading(original, [other, right], probe, bound=BOUNDS["bfloat16"])
    (told,) = problems
    assert "prompt 1: the greedy responses differ at token 1" in told
    assert "by 1.3 nats" in told  # ln(0.7 / 0.2) = 1.2528
    # 0.7 and 0.3 against 0.5 and 0.5: 0.7 ln 1.4 + 0.3 ln 0.6 = 0.08228 nats.
    apart: Reading = ([0, 2], [{0: math.log(0.5)}, tops[1]])
    parity, problems = compare_reading(original, [apart, right], probe, bound=BOUNDS["bfloat16"])
    assert parity.kl_max == pytest.approx(0.0822831, rel=1e-5)
    assert problems == ["per-token KL is up to 0.0823 nats, expected at most 0.021"]
    # A program that answers nothing at all.
    nothing: Reading = ([], [])
    parity, problems = compare_reading(original, [nothing] * 2, probe, bound=BOUNDS["float32"])
    assert (parity.kl_max, parity.same_text) == (math.inf, 0)
    assert problems == [
        "all responses are empty, so no log-probability could be compared",
        "prompt 1: the response has 0 tokens, expected 2",
        "prompt 2: the response has 0 tokens, expected 2",
    ]


def test_an_export_that_vllm_must_read_and_cannot_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "vllm_obstacle", lambda folder: "it is too small")
    lines = export(run / "sft", tmp_path / "out", dtype="float32", readers="auto")
    assert lines[1] == "not compared with vLLM: it is too small"
    with pytest.raises(ArtifactError, match="--verify vllm: not compared: it is too small"):
        export(run / "sft", tmp_path / "refused", dtype="float32", readers="vllm")
    monkeypatch.setattr(tools, "vllm_obstacle", lambda folder: None)
    # Another reader that answers every prompt with one wrong token.
    wrong = ([5], [{5: 0.0}])
    monkeypatch.setattr(
        tools, "read_by_vllm", lambda folder, prompts, **_: [wrong for _ in prompts]
    )
    with pytest.raises(ArtifactError, match="vLLM reads another model from the export: per-token"):
        export(run / "sft", tmp_path / "refused", dtype="float32", readers="auto")
    assert not (tmp_path / "refused").exists()
