"""``align plan``: predicted memory against saved tensors, measured peaks and hand calculation."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from align.models.attention import PACKED, segments_from_positions
from align.models.logprobs import hidden_states
from align.preflight.memory import (
    GIB,
    ModelSize,
    activation_bytes,
    predict,
    size_of_model,
    state_bytes,
)
from align.recipe.load import load_recipe
from align.recipe.schema import DataSpec, GrpoStage, PpoStage, SftStage, ZeroSpec
from align.stages.tools import plan as tool
from benchmarks.plan_memory import MODELS

ROOT = Path(__file__).resolve().parents[2]


def sft(**given) -> SftStage:
    return SftStage(kind="sft", init="x", data=[DataSpec(path="x")], **given)


def size(config, trained: int | None = None) -> ModelSize:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numbers = [p.numel() for p in model.parameters()]
    total = sum(numbers)
    return size_of_model(
        config, total=total, trained=total if trained is None else trained, largest=max(numbers)
    )


def qwen(hidden: int, layers: int, heads: int, keys: int, inner: int, vocab: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        intermediate_size=inner,
        vocab_size=vocab,
        tie_word_embeddings=True,
    )


SMOLLM2 = LlamaConfig(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49152,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "keys", "inner"), [(4, 4, 688), (8, 2, 512)])
def test_activations_are_those_that_autograd_keeps(dtype, heads, keys, inner) -> None:
    config = qwen(256, 3, heads, keys, inner, 500)
    config._attn_implementation = PACKED
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    length, rows = 128, 4
    positions = torch.arange(length).repeat(rows)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ids = torch.arange(length * rows) % 500
        hidden_states(model, ids, segments_from_positions(positions))
    found = sum(storage.nbytes() for storage in kept.values())
    spec = sft(dtype=dtype, max_length=length, micro_tokens=length * rows)
    predicted = activation_bytes(spec, size(config), device="cpu")
    assert predicted == pytest.approx(found, rel=0.15)


def test_states_of_a_7b_model_by_hand() -> None:
    total, given = 7_000_000_000, {"dtype": "bfloat16", "total": 7e9, "trained": 7_000_000_000}
    alone = state_bytes(ZeroSpec(stage=1), ranks=1, **given)
    # 2 bytes a weight, 4 a gradient, 4 for its float32 copy and 8 for Adam's moments.
    assert (alone["weights"], alone["gradients"], alone["optimizer"]) == (
        2 * total,
        4 * total,
        12 * total,
    )
    sharded = state_bytes(ZeroSpec(stage=3), ranks=8, **given)
    for name in ("weights", "gradients", "optimizer"):
        assert sharded[name] == alone[name] / 8
    second = state_bytes(ZeroSpec(stage=2), ranks=8, **given)
    assert second["weights"] == 2 * total
    assert second["gradients"] == 4 * total / 8
    plain = state_bytes(ZeroSpec(), ranks=1, dtype="float32", total=7e9, trained=total)
    assert sum(plain.values()) == 16 * total
    offloaded = state_bytes(ZeroSpec(stage=2, offload="cpu"), ranks=8, **given)
    assert offloaded["optimizer"] == 0


@pytest.mark.parametrize(
    ("shape", "checkpointing", "measured"),
    [
        ((896, 24, 14, 2, 4864, 151936), False, 36.2),
        ((1536, 28, 12, 2, 8960, 151936), True, 34.2),
    ],
)
def test_peaks_measured_on_an_h200(shape, checkpointing, measured) -> None:
    """The peaks of benchmarks/README.md, without what the process itself takes."""
    spec = sft(
        dtype="bfloat16",
        max_length=2048,
        micro_tokens=16384,
        gradient_checkpointing=checkpointing,
    )
    found = predict(spec, size(qwen(*shape)), rewards={}, ranks=1, device="gpu")
    own = sum(n for name, n in found.parts.items() if name != "reduction buffer") / GIB
    assert own == pytest.approx(measured, rel=0.15)


MEASURED = {
    "10.5M": {
        1: {0: 0.81, 1: 1.00, 2: 0.96, 3: 1.01},
        2: {0: 0.79, 1: 0.89, 2: 0.85, 3: 0.90},
        4: {0: 0.75, 1: 0.77, 2: 0.76, 3: 0.83},
    },
    "135M": {
        1: {0: 3.67, 1: 5.70, 2: 5.14, 3: 4.19},
        2: {0: 3.66, 1: 3.90, 2: 3.65, 3: 2.91},
        4: {0: 3.37, 2: 2.88},
    },
}
"""GiB by model, ranks and ZeRO stage, as ``python -m benchmarks.plan_memory`` found them."""


@pytest.mark.parametrize(
    ("model", "ranks", "stage"),
    [
        (m, n, z)
        for m, of_model in MEASURED.items()
        for n, stages in of_model.items()
        for z in stages
    ],
)
def test_peaks_measured_on_a_cpu(model, ranks, stage) -> None:
    """The table of docs/scale.md."""
    spec = sft(micro_tokens=256, max_length=64, zero={"stage": stage})
    shape = MODELS[model]
    config = qwen(
        *(shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads),
        *(shape.num_key_value_heads, shape.intermediate_size, shape.vocab_size),
    )
    found = predict(spec, size(config), rewards={}, ranks=ranks, device="cpu")
    assert found.peak / GIB == pytest.approx(MEASURED[model][ranks][stage], rel=0.15)


def test_the_larger_of_two_settings_needs_more() -> None:
    model = size(SMOLLM2)

    def peak(ranks: int = 1, **given) -> float:
        spec = sft(dtype="bfloat16", **given)
        return predict(spec, model, rewards={}, ranks=ranks, device="gpu").phases["step"]

    assert peak(micro_tokens=16384) > peak(micro_tokens=8192)
    assert peak(gradient_checkpointing=True) < peak()
    large = size(qwen(3584, 28, 28, 4, 18944, 152064))
    stages = [
        predict(
            sft(dtype="bfloat16", zero={"stage": stage}), large, rewards={}, ranks=8, device="gpu"
        ).peak
        for stage in (1, 2, 3)
    ]
    assert stages == sorted(stages, reverse=True)
    assert len(set(stages)) == 3
    lora = dataclasses.replace(model, trained=1_000_000)
    spec = sft(dtype="bfloat16", tuning={"method": "lora"})
    adapted = predict(spec, lora, rewards={}, ranks=1, device="gpu").phases["step"]
    assert adapted < peak() - 15 * model.total


def test_other_models_of_online_stages() -> None:
    model, memory = size(SMOLLM2), 80 * GIB
    common = {
        "init": "x",
        "prompts": [{"path": "x"}],
        "rewards": [{"kind": "scalar", "model": "r"}],
        "steps": 1,
        "dtype": "bfloat16",
    }
    rewards = {"reward r": (model.total, "float32")}
    given = {"rewards": rewards, "ranks": 1, "device": "gpu", "memory": memory}
    by_hand = GrpoStage(kind="grpo", **(common | {"sampling": {"memory_frac": 0.3}}))
    grpo = predict(by_hand, model, **given)
    assert grpo.parts["engine"] == pytest.approx(0.3 * memory)
    assert grpo.parts["reward r"] == 4 * model.total
    spread = GrpoStage(kind="grpo", zero=ZeroSpec(stage=3), **common)
    shared = predict(spread, model, **given | {"ranks": 8})  # type: ignore[arg-type]
    assert shared.parts["reward r"] == 4 * model.total / 8
    assert "reference" not in grpo.parts
    assert "critic" not in grpo.parts
    ppo = predict(PpoStage(kind="ppo", **common), model, **given)
    assert ppo.parts["reference"] == 2 * model.total
    assert ppo.parts["critic"] >= 18 * model.total


def test_an_engine_sleeps_in_a_step_and_takes_what_is_left_when_it_samples() -> None:
    model, memory = size(SMOLLM2), 80 * GIB
    spec = GrpoStage(
        kind="grpo",
        init="x",
        prompts=[{"path": "x"}],  # type: ignore[list-item]
        rewards=[{"kind": "scalar", "model": "r"}],  # type: ignore[list-item]
        steps=1,
        dtype="bfloat16",
    )
    rewards = {"reward r": (model.total, "float32")}
    found = predict(spec, model, rewards=rewards, ranks=1, device="gpu", memory=memory)
    # bfloat16 runs as ZeRO stage 1: weights in 2 bytes, a float32 copy and two moments in 12, a
    # buffer of all gradients in 2; the reward in 4; two copies of the largest tensor in float32.
    held = (2 + 12 + 2 + 4) * model.total + 2 * 4 * 49152 * 576
    # 1 GiB is the CUDA context, 1 GiB is left for buffers, and a tenth of the rest stays free.
    assert found.parts["engine"] == pytest.approx(0.9 * (memory - 2 * GIB - held))
    assert found.phases["sampling"] == pytest.approx(GIB + held + found.parts["engine"])
    asleep = sum(n for name, n in found.parts.items() if name != "engine")
    assert found.phases["step"] == pytest.approx(GIB + asleep)


def test_idle_models_are_not_beside_an_engine_or_a_step() -> None:
    model, memory = size(SMOLLM2), 80 * GIB
    common = {
        "kind": "ppo",
        "init": "x",
        "prompts": [{"path": "x"}],
        "rewards": [{"kind": "scalar", "model": "r"}],
        "steps": 1,
        "dtype": "bfloat16",
    }
    given = {
        "rewards": {"reward r": (model.total, "float32")},
        "ranks": 2,
        "device": "gpu",
        "memory": memory,
    }
    there, away, divided, same = (
        predict(
            PpoStage.model_validate(common | {"zero": {"stage": stage}, "offload_idle": idle}),
            model,
            **given,
        )
        for stage in (2, 3)
        for idle in (False, True)
    )
    # The reward in float32, the reference in bfloat16.
    saved = (4 + 2) * model.total
    assert there.phases["step"] - away.phases["step"] == pytest.approx(saved)
    # The optimizer states of policy and critic, 12 bytes over two ranks each, are away while the
    # engine is awake, and it gets nine tenths of what is free.
    states = 2 * 12 * model.total / 2
    assert away.parts["engine"] - there.parts["engine"] == pytest.approx(0.9 * (saved + states))
    assert away.phases["load"] == there.phases["load"]
    # One at a time comes back: the larger of the two is the reward.
    parts = ("weights", "optimizer", "reduction buffer", "critic")
    kept = sum(away.parts[name] for name in parts)
    assert away.phases["scoring"] == pytest.approx(GIB + kept + 4 * model.total)
    # Models that are divided among the ranks stay, optimizer states do not.
    more = same.parts["engine"] - divided.parts["engine"]
    assert more == pytest.approx(0.9 * states)
    for phase, bytes_ in same.phases.items():
        change = more - states if phase == "sampling" else 0.0
        assert bytes_ - divided.phases[phase] == pytest.approx(change)


@pytest.mark.parametrize(
    ("method", "adapted", "weights"),
    [("full", False, 2 / 4), ("lora", False, 0), ("bottleneck", False, 0), ("bottleneck", True, 2)],
)
def test_a_reference_is_sharded_unless_its_adapter_cannot_be_merged(
    method: str, adapted: bool, weights: float
) -> None:
    model = dataclasses.replace(size(SMOLLM2), adapted=adapted)
    spec = PpoStage(
        kind="ppo",
        init="x",
        prompts=[{"path": "x"}],  # type: ignore[list-item]
        rewards=[{"kind": "length", "target": 2, "limit": 12}],  # type: ignore[list-item]
        steps=1,
        dtype="bfloat16",
        zero={"stage": 3},  # type: ignore[arg-type]
        tuning={"method": method},  # type: ignore[arg-type]
    )
    found = predict(spec, model, rewards={}, ranks=4, device="gpu", memory=80 * GIB)
    assert found.parts.get("reference", 0) == weights * model.total


def test_the_start_of_a_stage_is_known_before_and_after_it_is_made(recipe: Path) -> None:
    given = json.loads(recipe.read_text())
    for name in ("sft", "more"):
        given["stages"][name]["tuning"] = {"method": "bottleneck"}
    recipe.write_text(json.dumps(given))
    loaded, run_dir = load_recipe(recipe), recipe.parent / "runs"
    sizes = tool.Sizes(loaded, run_dir)
    specs = [loaded.stages[name] for name in ("sft", "more")]
    assert [sizes.of(spec).adapted for spec in specs] == [False, True]  # type: ignore[arg-type]
    # An artifact says it by its files, whatever the recipe says now.
    model = loaded.folder_of("sft", run_dir) / "model"
    model.mkdir(parents=True)
    assert not sizes.of(specs[1]).adapted  # type: ignore[arg-type]
    adapter = model.with_name("adapter")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "BOTTLENECK"}')
    assert sizes.of(specs[1]).adapted  # type: ignore[arg-type]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    shape = {"vocab_size": 1000, "hidden_size": 256, "num_layers": 2, "num_heads": 4}
    build = {**shape, "num_kv_heads": 2, "intermediate_size": 512}
    base = {"kind": "base", "build": build, "data": [{"world": "corpus", "rows": 9}], "steps": 1}
    trained = {"kind": "sft", "init": "base", "data": [{"world": "sft", "rows": 9}]}
    stages = {"base": base, "sft": trained, "more": {**trained, "init": "sft"}}
    file.write_text(json.dumps({"name": "r", "stages": stages}))
    return file


def test_gpus_elsewhere_are_planned_in_their_usual_dtype(recipe: Path, capsys) -> None:
    def said(*words: str) -> list[str]:
        with pytest.raises(SystemExit):
            tool.main([str(recipe), "--runs", str(recipe.parent), "--only", "sft", *words])
        return capsys.readouterr().out.splitlines()[0].split(", ")

    assert said()[-1] == "float32"
    assert said("--gpus", "2", "--memory", "80")[-1] == "bfloat16"
    assert said("--memory", "80", "--set", "dtype=float32")[-1] == "float32"
    assert said("--memory", "80", "--set", "sft.dtype=float32")[-1] == "float32"


def test_command_reads_only_the_recipe_and_says_what_to_change(recipe, capsys) -> None:
    options = [str(recipe), "--runs", str(recipe.parent), "--gpus", "4", "--memory"]
    with pytest.raises(SystemExit) as ended:
        tool.main([*options, "80"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "fits" in said
    assert "4 ranks" in said
    assert said.count("(sft)") == 2
    with pytest.raises(SystemExit) as ended:
        tool.main([*options, "1.1", "--only", "sft"])
    assert ended.value.code == 2
    line = capsys.readouterr().out.splitlines()[-1]
    assert "does not fit" in line
    # The change that it names is enough.
    words = line.partition("; change ")[2].split(", ")
    assert words[0], line
    sets = [word for text in words for word in ("--set", text)]
    with pytest.raises(SystemExit) as ended:
        tool.main([*options, "1.1", "--only", "sft", *sets])
    assert ended.value.code == 0, capsys.readouterr().out
    assert [p.name for p in recipe.parent.iterdir()] == ["r.yaml"]


def test_unknown_stage_is_one_line(recipe, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main([str(recipe), "--gpus", "1", "--memory", "80", "--only", "stf"])
    assert ended.value.code == 2
    assert "no stage 'stf'" in capsys.readouterr().err


def test_shipped_recipes_can_be_planned() -> None:
    """Every training stage of a shipped recipe that needs no download."""
    loaded = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    machine = tool.Machine("gpu", 80 * GIB, None)
    found = list(tool.plan(loaded, Path("nowhere"), machine))
    assert len(found) >= 4
    assert all(fits for _, _, _, fits in found)


def test_command_line_starts_the_tool(recipe) -> None:
    argv = [sys.executable, "-m", "align.cli", "plan", str(recipe), "--gpus", "1", "--memory", "80"]
    done = subprocess.run(
        [*argv, "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=recipe.parent,
    )
    stages = json.loads(done.stdout)["stages"]
    assert set(stages) == {"sft", "more"}
    assert stages["sft"]["fits"] is True
