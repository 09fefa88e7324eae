"""Every tuning method through every training stage; peft's own forward is the oracle of files."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
sys.path.insert(0, str(Path(__file__).parent))
import alone
from tuned_stages import TUNINGS, make_base, run_plain, run_stage, tuning_spec

from align.core.artifacts import Artifact, write_manifest
from align.core.errors import ArtifactError, PreflightError
from align.models.logprobs import LogprobModel
from align.recipe.schema.tuning import METHODS as CLASSES
from align.sampling.build import build_engine, choose_engine
from align.sampling.engine import EngineOptions
from align.sampling.push import pushed_weights
from align.stages.tools.chat import Chat
from align.tuning.export import full_precision_weights
from align.tuning.loading import load_for_training, load_reward_model, load_tuned_policy

METHODS = list(TUNINGS)
ADAPTED = [m for m in METHODS if m != "full"]
RESUMED = [("sft", m) for m in METHODS] + [
    (kind, m)
    for kind in ("reward", "classify", "dpo", "kto", "ppo", "grpo")
    for m in ("lora", "qlora", "bottleneck", "prefix")
]
SAVING = {"checkpoint_every": 1, "keep_checkpoints": 2}
IDS = [5, 90, 17, 33, 120, 12, 8, 77, 201]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with alone.world_of_one():
        yield make_base(tmp_path_factory.mktemp("tuned"))


_DONE: dict[tuple[str, str], Artifact] = {}


def artifact(folder: Path, kind: str, method: str) -> Artifact:
    """Run a stage once and keep what it wrote."""
    if (kind, method) not in _DONE:
        name = f"{kind}_{method}"
        _DONE[kind, method] = run_stage(folder, kind, block(kind, method), name=name, **SAVING)
    return _DONE[kind, method]


def block(kind: str, method: str) -> dict[str, Any]:
    """Give the tuning block of a method; a scorer does not know where a prompt ends."""
    keys = TUNINGS[method].items()
    new_head = kind in ("reward", "classify")
    return {"method": method, **{k: v for k, v in keys if k != "last" or not new_head}}


def first_metrics(found: Artifact) -> dict[str, float]:
    lines = (found.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[0])


def by_peft(folder: Path, found: Artifact, kind: Any = AutoModelForCausalLM) -> Any:
    """Load the base and the saved adapter with transformers and peft alone."""
    base = kind.from_pretrained(folder / "base" / "model", attn_implementation="eager")
    return PeftModel.from_pretrained(base, str(found.path / "adapter")).eval()


def oracle(model: Any, ids: list[int]) -> list[float]:
    """Give the log-probability of each token but the first, by one plain forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
    logprobs = logits.double().log_softmax(-1)
    return [logprobs[t - 1, ids[t]].item() for t in range(1, len(ids))]


@pytest.mark.parametrize("method", ADAPTED)
def test_saved_policy_is_base_with_adapter(folder, method):
    found = artifact(folder, "sft", method)
    expected = oracle(by_peft(folder, found), IDS)
    model = LogprobModel(load_tuned_policy(found.model_dir, dtype="float32"))
    with torch.no_grad():
        packed = model(torch.tensor([IDS]), torch.arange(len(IDS)).unsqueeze(0)).logprobs[0, 1:]
    assert packed.tolist() == pytest.approx(expected, abs=2e-4)
    base = AutoModelForCausalLM.from_pretrained(folder / "base" / "model")
    assert max(abs(a - b) for a, b in zip(oracle(base, IDS), expected, strict=True)) > 1e-3
    ours, theirs = (
        load_file(d / "model.safetensors") for d in (found.model_dir, folder / "base" / "model")
    )
    frozen = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert frozen == (not CLASSES[method].merges)


@pytest.mark.parametrize("method", ADAPTED)
def test_engine_gives_the_greedy_tokens_of_transformers(folder, method):
    found = artifact(folder, "sft", method)
    engine = build_engine("hf", EngineOptions(found.model_dir, max_model_len=64))
    model = by_peft(folder, found)
    for prompt in (IDS[:4], IDS[2:8]):
        (answer,) = engine.generate([prompt], n=1, max_new_tokens=10, temperature=0.0)[0]
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(answer.token_ids) == out[0, -10:].tolist()
    batch = engine.generate([IDS[:4], IDS[2:8]], n=1, max_new_tokens=10, temperature=0.0)
    assert batch[1][0].token_ids == answer.token_ids
    engine.close()


@pytest.mark.parametrize("method", METHODS)
def test_dpo_starts_at_its_reference(folder, method):
    found = artifact(folder, "dpo", method)
    if CLASSES[method].virtual:
        # Virtual tokens change the policy before the first step; the reference is without them.
        assert abs(first_metrics(found)["train/loss"] - 0.6931) > 1e-3
    else:
        assert first_metrics(found)["train/loss"] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_grpo_starts_at_its_reference_and_the_engine_has_its_weights(folder, method):
    found = artifact(folder, "grpo", method)
    first = first_metrics(found)
    assert (abs(first["kl/reference"]) > 1e-3) == CLASSES[method].virtual
    # After a step the policy has left its reference, which it would not with its adapter on.
    assert found.manifest["metrics"]["kl/reference_k3"] > 1e-5
    assert abs(first["kl/sampler"]) < 1e-4
    assert abs(found.manifest["metrics"]["kl/sampler"]) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_kto_starts_at_its_reference(folder, method):
    """At the reference every answer's loss is 1 - sigmoid(0)."""
    loss = first_metrics(artifact(folder, "kto", method))["train/loss"]
    if CLASSES[method].virtual:
        assert abs(loss - 0.5) > 1e-4
    else:
        assert loss == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_ppo_trains_policy_and_critic(folder, method):
    found = artifact(folder, "ppo", method)
    assert abs(found.manifest["metrics"]["kl/sampler"]) < 1e-4
    assert found.manifest["metrics"]["value/loss"] > 0.0


@pytest.mark.parametrize("method", ADAPTED)
def test_saved_scorer_is_backbone_with_adapter_and_head(folder, method):
    found = artifact(folder, "reward", method)
    model = by_peft(folder, found, AutoModel)
    head = load_file(found.model_dir / "model.safetensors")["score.weight"][0]
    with torch.no_grad():
        states = model(input_ids=torch.tensor([IDS])).last_hidden_state[0, -len(IDS) :]
        padded = torch.tensor([[*IDS, 0, 0], [*IDS[:5], *[0] * 6]])
        mask = (torch.arange(11) < torch.tensor([[9], [5]])).long()
        scores = load_reward_model(found.model_dir)(padded, attention_mask=mask)
    expected = (states @ head).tolist()
    assert scores[0, :9].tolist() == pytest.approx(expected, abs=2e-4)
    assert scores[1, 4].item() == pytest.approx(expected[4], abs=2e-4)


@pytest.mark.parametrize(("kind", "method"), RESUMED)
def test_stage_resumed_from_a_checkpoint_ends_with_the_same_bytes(folder, kind, method):
    whole = artifact(folder, kind, method)
    name = f"resumed_{kind}_{method}"
    kept = "checkpoints/step-00000001"
    shutil.copytree(whole.path / kept, folder / name / kept)
    lines = (whole.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / name / "metrics.jsonl").write_text(lines[0], encoding="utf-8")
    again = run_stage(folder, kind, block(kind, method), name=name, **SAVING)
    assert first_metrics(again) == first_metrics(whole)  # the step before was not done again
    files = [p.relative_to(whole.path) for p in whole.path.glob("*/*.safetensors")]
    assert files
    for file in files:
        assert (again.path / file).read_bytes() == (whole.path / file).read_bytes(), file


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_policy_trains_and_the_engine_has_its_weights(folder, method):
    name, more = f"bf16_{method}", {"dtype": "bfloat16", "steps": 1, "group_size": 8}
    found = run_stage(folder, "grpo", block("grpo", method), name=name, **more)
    assert first_metrics(found)["policy/grad_norm"] > 0.0
    assert abs(first_metrics(found)["kl/sampler"]) < 0.05


def test_reward_head_alone_leaves_the_backbone_as_it_was(folder):
    found = run_stage(folder, "reward", {"method": "head"}, name="reward_head")
    state = load_file(found.model_dir / "model.safetensors")
    base = AutoModel.from_pretrained(folder / "base" / "model").state_dict()
    assert all(torch.equal(state[f"model.{n}"], t) for n, t in base.items())
    fresh = run_stage(folder, "reward", {"method": "head"}, name="reward_head_1", steps=1)
    other = load_file(fresh.model_dir / "model.safetensors")["score.weight"]
    assert not torch.equal(state["score.weight"], other)


@pytest.mark.parametrize("method", ["bottleneck", "loreft"])
def test_same_block_goes_on_with_an_unmerged_adapter(folder, method):
    start = artifact(folder, "sft", method)
    tuning = {"method": method, **TUNINGS[method]}
    for kind in ("dpo", "grpo"):
        found = run_stage(folder, kind, tuning, name=f"on_{kind}_{method}", init=str(start.path))
        first = first_metrics(found)
        # Its reference is the start with the adapter on, not the base.
        if kind == "dpo":
            assert first["train/loss"] == pytest.approx(0.693147, abs=1e-4)
        else:
            assert abs(first["kl/reference"]) < 1e-3
        before, after = (
            load_file(a.path / "adapter" / "adapter_model.safetensors") for a in (start, found)
        )
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    ("method", "kind", "tuning", "said"),
    [
        ("prefix", "dpo", {"method": "prefix", "virtual_tokens": 3}, "cannot be trained further"),
        ("prompt", "grpo", {"method": "lora"}, "cannot be trained further"),
        ("bottleneck", "dpo", {"method": "full"}, "repeat the same 'tuning' block"),
        ("bottleneck", "sft", {"method": "bottleneck", "size": 9}, "repeat the same 'tuning'"),
        ("loreft", "reward", {"method": "full"}, "needs merged weights"),
    ],
)
def test_training_on_top_of_an_unmerged_adapter_is_refused(folder, method, kind, tuning, said):
    start = artifact(folder, "sft", method)
    with pytest.raises(ArtifactError, match=said):
        run_stage(folder, kind, tuning, name="refused", init=str(start.path))


def test_critic_does_not_start_from_an_unmerged_policy(folder):
    start = artifact(folder, "sft", "bottleneck")
    tuning = {"method": "bottleneck", **TUNINGS["bottleneck"]}
    with pytest.raises(ArtifactError, match="critic"):
        run_stage(folder, "ppo", tuning, name="refused", init=str(start.path))


@pytest.mark.parametrize("method", ["lora", "ptuning", "bottleneck"])
def test_chat_answers_as_the_engine_does(folder, method):
    found = artifact(folder, "sft", method)
    chat = Chat(found.model_dir, temperature=0.0, max_new_tokens=6)
    said = io.StringIO()
    answer = chat.answer("2 plus 2", said)
    prompt = chat.format.prompt_ids([{"role": "user", "content": "2 plus 2"}])
    engine = build_engine(
        "hf",
        EngineOptions(
            found.model_dir, max_model_len=128, stop_token_ids=chat.format.stop_token_ids
        ),
    )
    ((expected,),) = engine.generate([prompt], n=1, max_new_tokens=6, temperature=0.0)
    assert answer == expected.text.strip()
    assert answer in said.getvalue()


def test_evaluate_compares_policies_with_and_without_unmerged_adapters(folder):
    models = [artifact(folder, "sft", m).path for m in ("lora", "prefix", "bottleneck")]
    scorer = artifact(folder, "reward", "prompt").path
    plain = {
        "kind": "evaluate",
        "models": ["base", *map(str, models)],
        "baseline": "base",
        "prompts": [{"world": "prompts", "rows": 6}],
        "scores": [{"kind": "scalar", "model": str(scorer)}],
        "judge": [{"kind": "length", "target": 2, "limit": 12}],
        "sampling": {"engine": "hf", "max_new_tokens": 6, "temperature": 1.0},
        "max_length": 128,
    }
    found = run_plain(folder, plain, name="evaluate")
    summary = json.loads((found.path / "summary.json").read_text(encoding="utf-8"))
    assert summary["engine"] == "hf"
    for model in models:
        # A policy read without its adapter would be the base: KL 0.
        assert abs(summary["tasks"]["heldout"]["models"][str(model)]["kl"][0]) > 1e-3


def merged(folder: Path, tuned: Path, name: str) -> Artifact:
    plain = {"kind": "merge", "base": "base", "tuned": str(tuned), "alphas": [0.5]}
    return run_plain(folder, plain, name=name)


def test_half_of_a_merged_lora_is_the_adapter_at_half_its_scale(folder):
    tuned = artifact(folder, "sft", "lora")
    model = by_peft(folder, tuned)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.mul_(0.5)
    found = merged(folder, tuned.path, "merge")
    half = AutoModelForCausalLM.from_pretrained(found.model_dir).eval()
    assert oracle(half, IDS) == pytest.approx(oracle(model, IDS), abs=1e-4)


def test_models_of_different_tokens_are_not_merged(folder):
    other = folder / "other_tokens"
    shutil.copytree(artifact(folder, "sft", "lora").path, other)
    file = other / "model" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"<pad>"', '"<blank>"'))
    (other / "manifest.json").unlink()
    write_manifest(other, {"kind": "policy", "spec_hash": "other", "spec": {}})
    with pytest.raises(PreflightError, match="its tokenizer differs from that of base"):
        merged(folder, other, "mixed")


def test_unmerged_adapter_falls_back_to_hf_by_name(folder):
    found = artifact(folder, "sft", "prompt")
    assert choose_engine("auto", found.model_dir) == (
        "hf",
        "vllm cannot serve this model: its prompt adapter cannot be merged into the weights that "
        "vLLM serves",
    )
    assert "adapter" not in choose_engine("auto", artifact(folder, "sft", "dora").model_dir)[1]


def test_qlora_samples_from_the_policy_that_it_trains(folder):
    model = load_for_training(
        folder / "base" / "model", tuning_spec("qlora"), dtype="float32"
    ).eval()
    row, positions = torch.tensor([IDS]), torch.arange(len(IDS)).unsqueeze(0)
    with torch.no_grad():
        trained = LogprobModel(model)(row, positions).logprobs[0, 1:].tolist()
    engine = build_engine("hf", EngineOptions(folder / "base" / "model", max_model_len=64))
    engine.load_weights(pushed_weights(model), version=1)
    assert engine.token_logprobs(IDS) == pytest.approx(trained, abs=1e-4)
    # What is saved is the update beside the full-precision weights: another policy.
    saved = full_precision_weights(model, folder / "base" / "model")
    engine.load_weights(saved, version=2)
    gaps = [abs(a - b) for a, b in zip(engine.token_logprobs(IDS), trained, strict=True)]
    assert max(gaps) > 1e-2
    engine.close()
