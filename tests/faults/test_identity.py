"""What a stage was made from is noticed when it changes: at resume, at the next run, afterwards."""

import errno
import gzip
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch

from align.core import checkpoints
from align.core.artifacts import find_damage, read_artifact, read_manifest, write_manifest
from align.core.errors import ArtifactError, DataError, RecipeError
from align.core.identity import changed_file, find_difference
from align.data.reading import read_log
from align.data.reading.provenance import file_records, hub_revisions, named_files
from align.data.reading.sources import data_fingerprint, read_rows
from align.pipeline.planning import plan
from align.pipeline.running import run
from align.pipeline.verify import verify_run
from align.recipe.load import load_recipe
from align.stages import base
from align.tuning.files import save_adapter

RECIPE = """\
name: r
stages:
  base: {kind: base, path: model, tokenizer: {chat_template: t.jinja}}
  sft: {kind: sft, init: base, data: [{path: rows}], steps: 2}
"""


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    Path("rows").mkdir()
    Path("rows/a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("model/model.safetensors").write_bytes(bytes(64))
    Path("t.jinja").write_text("{{ messages }}")
    yield
    read_log.expect(None)
    checkpoints.belong_to(None)


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".txt", ".parquet"])
def test_the_fingerprint_is_that_of_the_parsed_bytes_not_of_a_later_file(suffix: str) -> None:
    path = Path(f"d{suffix}")
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    else:
        text = {".json": '[{"text": "a"}, {"text": "b"}]', ".csv": "text,n\na,1\nb,2\n"}
        text[".txt"] = "a\n\nb\n"
        content = text.get(suffix, '{"text": "a"}\n\n{"text": "b"}\n').encode()
        path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    before = sha256(str(path))
    read_log.expect({})
    assert len(list(read_rows(str(path)))) == 2
    path.write_bytes(b"something else")
    assert data_fingerprint(str(path)) == [{"path": str(path), "sha256": before, "rows": 2}]


def test_a_file_that_changes_between_two_readings_of_a_stage_is_refused() -> None:
    read_log.expect({"rows/a.jsonl": sha256("rows/a.jsonl")})
    list(read_rows("rows"))
    Path("rows/a.jsonl").write_text('{"text": "c"}\n')
    with pytest.raises(DataError, match=r"rows/a\.jsonl: changed while the stage was reading it"):
        list(read_rows("rows"))


def identity(stage: str = "sft") -> dict:
    recipe = load_recipe("r.yaml")
    files = file_records(named_files(recipe.stages[stage], recipe.inputs(stage)))
    return {"spec_hash": "s", "inputs": {}, "files": files}


def test_every_file_that_a_stage_names_is_part_of_its_identity() -> None:
    assert list(identity()["files"]) == ["rows/a.jsonl"]
    assert list(identity("base")["files"]) == [
        "model/config.json",
        "model/model.safetensors",
        "t.jinja",
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda: Path("rows/a.jsonl").write_text('{"text": "x"}\n{"text": "b"}\n'), "has changed"),
        (lambda: Path("rows/b.jsonl").write_text("{}\n"), "is new"),
        (lambda: Path("rows/a.jsonl").rename("rows/c.jsonl"), "is new"),
        (lambda: Path("rows/a.jsonl").unlink(), "is gone"),
    ],
)
def test_find_difference_names_the_file(change, told: str) -> None:
    before = identity()
    assert find_difference(before, identity()) is None
    change()
    found = find_difference(before, identity()) or ""
    assert "rows/" in found
    assert told in found


def test_another_revision_of_a_hub_data_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network, the hub's cache tells the commit, as it does on a compute node."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = RECIPE.replace("{path: rows}", "{path: some/rows}, {path: some/pinned, revision: v1}")
    Path("r.yaml").write_text(text)
    spec = load_recipe("r.yaml").stages["sft"]
    assert hub_revisions(spec) == {}
    for name, reference in (("some--rows", "main"), ("some--pinned", "v1")):
        refs = Path(f"cache/datasets--{name}/refs")
        refs.mkdir(parents=True)
        (refs / reference).write_text("a" * 40)
    before = identity() | {"hub": hub_revisions(spec)}
    assert before["hub"] == {"some/rows": "a" * 40, "some/pinned@v1": "a" * 40}
    assert find_difference(before, before) is None
    Path("cache/datasets--some--rows/refs/main").write_text("b" * 40)
    after = identity() | {"hub": hub_revisions(spec)}
    told = f"some/rows of the hub is at revision {'b' * 12}, it was {'a' * 12}"
    assert find_difference(before, after) == told
    # A machine that cannot tell, and a record of an older version, refuse nothing.
    assert find_difference(before, identity() | {"hub": {}}) is None
    assert find_difference(identity(), after) is None


def test_a_new_time_alone_is_no_change() -> None:
    before = identity()
    os.utime("rows/a.jsonl", (1, 1))
    assert find_difference(before, identity()) is None
    assert changed_file(before["files"], {"rows/a.jsonl": Path("rows/a.jsonl")}) is None


def finish(stage: str, status: str = "done") -> Path:
    """Write the folder of a finished or begun stage as the suite does."""
    recipe = load_recipe("r.yaml")
    hashes = {}
    from align.core.artifacts import spec_hash

    for name, spec in recipe.stages.items():
        inputs = {k: hashes.get(v, v) for k, v in recipe.inputs(name).items()}
        hashes[name] = spec_hash(spec.settings(), seed=0, inputs=inputs)
    own = identity(stage) | {"spec_hash": hashes[stage]}
    folder = Path("runs/r") / stage
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(bytes(32))
    (folder / "begun.json").write_text(json.dumps(own))
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    if status == "done":
        write_manifest(
            folder,
            {"kind": "policy", "stage": stage, "spec_hash": own["spec_hash"], "identity": own},
        )
    return folder


def state(stage: str) -> tuple[str, str]:
    planned = {s.name: s for s in plan(load_recipe("r.yaml"), "runs/r")}
    return planned[stage].status, planned[stage].reason


@pytest.mark.parametrize("file", ["model/model.safetensors", "model/config.json", "t.jinja"])
def test_a_model_folder_or_template_that_changed_is_seen_by_the_plan(file: str) -> None:
    finish("base")
    assert state("base")[0] == "done"
    content = bytearray(Path(file).read_bytes())
    content[0] ^= 1
    Path(file).write_bytes(bytes(content))
    assert state("base") == ("changed", f"{file} changed since")


@pytest.mark.parametrize("status", ["done", "half-done"])
def test_data_that_changed_is_seen_by_the_plan_also_of_an_interrupted_stage(status: str) -> None:
    finish("sft", status)
    assert state("sft")[0] == status
    Path("rows/a.jsonl").write_text('{"text": "x"}\n{"text": "b"}\n')
    found, reason = state("sft")
    assert found == "changed"
    assert "rows/a.jsonl changed since" in reason


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "flip": lambda f: flip(f / "model" / "model.safetensors"),
    "cut": lambda f: (f / "model" / "model.safetensors").write_bytes(b""),
    "gone": lambda f: (f / "model" / "model.safetensors").unlink(),
    "extra": lambda f: (f / "model" / "special_tokens_map.json").write_text("{}"),
    "no files": lambda f: edit(f, files={}),
    "null": lambda f: (f / "manifest.json").write_text("null"),
    "list": lambda f: (f / "manifest.json").write_text("[]"),
    "not utf-8": lambda f: (f / "manifest.json").write_bytes(b"\xff{}"),
    "files gone": lambda f: (f / "manifest.json").write_text('{"kind": "policy"}'),
    "entry null": lambda f: edit(f, files={"model/model.safetensors": None}),
    "no kind": lambda f: edit(f, kind=None),
    "deep": lambda f: (f / "manifest.json").write_text("[" * 100000),
}


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_artifact_is_refused_in_one_line_and_never_planned_as_done(damage: str) -> None:
    folder = finish("base")
    read_artifact(folder, "policy")
    DAMAGES[damage](folder)
    assert state("base")[0] == "changed"
    with pytest.raises(ArtifactError) as told:
        read_artifact(folder, "policy")
    assert "\n" not in str(told.value)
    assert str(folder) in str(told.value)


def test_a_whole_verification_finds_what_size_and_time_do_not_show() -> None:
    folder = finish("base")
    weights = folder / "model" / "model.safetensors"
    times = weights.stat()
    flip(weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert find_damage(folder, read_manifest(folder), whole=False) == []
    assert "sha256 differs" in find_damage(folder, read_manifest(folder), whole=True)[0]


def finish_chain() -> None:
    """Finish base, and sft as made from it."""
    base_manifest = finish("base") / "manifest.json"
    folder = finish("sft")
    read = {"path": "base", "manifest_sha256": sha256(str(base_manifest))}
    edit(folder, inputs={"init": read})


def remove(path: str) -> None:
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


@pytest.mark.parametrize(
    ("gone", "told"),
    [("base", "was removed"), ("base/manifest.json", "is not finished any more")],
)
def test_a_stage_whose_input_is_gone_is_not_done(gone: str, told: str) -> None:
    finish_chain()
    assert state("sft")[0] == "done"
    assert verify_run(Path("runs/r"))[1]
    remove(f"runs/r/{gone}")
    assert state("sft") == ("changed", f"its input base {told}")
    with pytest.raises(RecipeError, match=f"sft: changed since it ran: its input base {told}"):
        run("r.yaml")
    assert not Path("runs/r/base/log.txt").exists()  # nothing was started
    lines, whole = verify_run(Path("runs/r"))
    assert not whole
    assert lines == [f"runs/r/sft: its input base {told}"]


def test_verify_names_an_input_that_was_made_again_and_a_stage_of_a_complete_run_that_is_gone():
    finish_chain()
    Path("runs/r/summary.json").write_text('{"stages": {"base": {}, "sft": {}, "eval": {}}}')
    edit(Path("runs/r/base"), seconds=3.0)
    lines, whole = verify_run(Path("runs/r"))
    assert not whole
    assert lines == [
        "runs/r/base: 2 files are as the stage left them",
        "runs/r/sft: its input base was created again since",
        "runs/r/eval: was finished, but its manifest is gone",
    ]


def save(step: int, keep: int = 9) -> Path:
    return checkpoints.save_checkpoint(
        Path("checkpoints"), step, engines={}, state={"step": step}, keep=keep
    )


def test_a_checkpoint_of_another_stage_is_passed_over_and_kept() -> None:
    checkpoints.belong_to(identity() | {"spec_hash": "other"})
    foreign = save(9)
    checkpoints.belong_to(identity())
    assert checkpoints.newest_checkpoint(Path("checkpoints")) is None
    own = save(3, keep=1)
    assert checkpoints.newest_checkpoint(Path("checkpoints")) == own
    assert foreign.is_dir()


RECORDS = {
    "null": "null",
    "list": "[]",
    "empty": "",
    "cut": '{"step": 3, "wor',
    "no files": '{"step": 3, "world_size": 1, "state": {}, "files": {}}',
    "files list": '{"step": 3, "world_size": 1, "state": {}, "files": []}',
    "entry null": '{"step": 3, "world_size": 1, "state": {}, "files": {"rng-0.pt": null}}',
    "digit": lambda text: text.replace('"step": 3,', '"step": 2,'),
    "state": lambda text: text.replace('"state": {', '"state": {"x": 1, '),
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_damaged_record_is_passed_over(record: str) -> None:
    checkpoints.belong_to(identity())
    before, newest = save(2), save(3)
    assert checkpoints.newest_checkpoint(Path("checkpoints")) == newest
    path, damage = newest / checkpoints.STATE, RECORDS[record]
    path.write_text(damage if isinstance(damage, str) else damage(path.read_text()))
    assert checkpoints.newest_checkpoint(Path("checkpoints")) == before


def test_a_checkpoint_that_cannot_be_read_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad sector in the newest checkpoint does not make the older ones worthless."""
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    before, newest = save(2), save(3)
    read = checkpoints.file_sha256

    def failing(path: Path) -> str:
        if path.is_relative_to(newest):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(checkpoints, "file_sha256", failing)
    assert checkpoints.newest_checkpoint(Path("checkpoints")) == before
    assert "damaged (rng-0.pt cannot be read: Input/output error)" in caplog.text


def test_a_checkpoint_under_another_steps_name_is_passed_over() -> None:
    save(3).rename("checkpoints/step-00000007")
    assert checkpoints.newest_checkpoint(Path("checkpoints")) is None


@pytest.mark.parametrize("make", [Path.touch, lambda p: p.symlink_to("nowhere")])
def test_a_file_or_link_in_a_checkpoints_place_does_not_stop_the_saving(make) -> None:
    Path("checkpoints").mkdir()
    make(Path("checkpoints/step-00000003"))
    assert torch.load(save(3) / "rng-0.pt", weights_only=True)


def test_files_and_folders_reach_the_disk_before_the_record_that_vouches_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A power cut must find either a whole checkpoint or none: the order of the system calls."""
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(fd: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def noted_rename(self: Path, target: Path) -> Path:
        order.append(f"-> {Path(target).name}")
        return rename(self, target)

    save(1)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    save(2)
    assert order == [
        "rng-0.pt",
        "step-00000002.tmp",
        "checkpoint.json.tmp",
        "-> checkpoint.json",
        "step-00000002.tmp",
        "-> step-00000002",
        "checkpoints",
    ]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_files_of_an_artifact_have_the_mode_of_the_umask(mask: int, mode: int) -> None:
    weights = Path("out/model/model.safetensors")
    weights.parent.mkdir(parents=True)
    weights.touch(0o600)
    before = os.umask(mask)
    try:
        write_manifest(Path("out"), {"kind": "policy"})
    finally:
        os.umask(before)
    assert weights.stat().st_mode & 0o777 == mode


def test_a_stage_that_has_ended_binds_nothing_that_its_process_reads_later() -> None:
    read_log.expect({})
    list(read_rows("rows"))
    base._release()
    Path("rows/a.jsonl").write_text('{"text": "c"}\n')
    assert [row for row, _ in read_rows("rows")] == [{"text": "c"}]


def test_an_adapters_file_is_the_same_in_every_process(tmp_path: Path) -> None:
    """A set has another order in a process with another hash seed: its names are sorted."""
    modules = {f"layers.{i}.{name}" for i in range(3) for name in ("q", "k", "v", "o", "up")}
    config = peft.LoraConfig(target_modules=modules, r=2)
    save_adapter({"w": torch.zeros(1)}, config, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == sorted(modules)
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).target_modules == modules
    assert config.target_modules == modules  # the stage may still train with it
