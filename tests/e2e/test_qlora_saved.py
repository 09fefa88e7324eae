"""What a qlora stage saves: the adapter of the 4-bit model, and a model whose loss it says."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModel, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
sys.path.insert(0, str(Path(__file__).parent))
import alone
from tuned_stages import COMMON, make_base, run_stage, tuning_spec, write_rows

from align.core.types import TokenRow
from align.data.load import load_examples
from align.models.logprobs import LogprobModel
from align.recipe.schema import DataSpec, Recipe
from align.stages import kto, sft
from align.stages.base import StageContext, chat_format
from align.stages.offline import (
    LOSS_SAVED,
    build_policy,
    load_init,
    offline_rows,
    read_back,
    train_policy,
)
from align.training.batch import flatten_pairs, pack
from align.training.task import OfflineTask
from align.tuning.loading import load_for_training

QLORA = {"method": "qlora", "rank": 4}
HELD_OUT = {"world": "preference", "rows": 12, "split": "heldout", "heldout_frac": 0.5}
TRAINED = {**HELD_OUT, "split": "train"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with alone.world_of_one():
        yield make_base(tmp_path_factory.mktemp("saved"))


def plain(path: Path) -> Any:
    """Load a policy with transformers alone."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def answer_sum(model: Any, row: TokenRow) -> float:
    """Sum the log-probabilities of a row's trained tokens, by one plain forward pass."""
    ids = row.input_ids
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(found[t - 1, ids[t]].item() for t in range(1, len(ids)) if row.trained[t])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def test_fresh_process_has_the_trained_model_and_the_loss_of_the_saved_one(folder):
    sides = {"data": [{**TRAINED, "world": "sft"}], "heldout": [{**HELD_OUT, "world": "sft"}]}
    stage = {"kind": "sft", **COMMON, **sides, "tuning": QLORA, "steps": 8, "batch_size": 4}
    recipe = Recipe.model_validate(
        {"name": "t", "stages": {"base": {"kind": "base", "path": "x"}, "sft": stage}}
    )
    spec: Any = recipe.stages["sft"]
    context = StageContext(recipe, "sft", folder, 0)
    context.out.mkdir()
    source = load_init(spec, context)
    chat = chat_format(source.model_dir)
    loaded = offline_rows(spec, context, render=chat.sft_row)
    rows, held = loaded.training, loaded.heldout
    module = build_policy(spec, source.model_dir)
    task = OfflineTask(rows, held, sft.length_of, sft.collate, sft.sft_loss)
    result = train_policy(spec, module, task, source=source, chat=chat, context=context)

    (folder / "rows.json").write_text(json.dumps([list(row.input_ids) for row in held]))
    worker = Path(__file__).parent / "workers" / "reload_qlora.py"
    files = [source.model_dir, context.out, folder / "rows.json", folder / "found.json"]
    subprocess.run([sys.executable, worker, *files], check=True, timeout=1200)
    found = json.loads((folder / "found.json").read_text())

    module.eval()
    with torch.no_grad():
        for row, logprobs in zip(held, found["adapter"], strict=True):
            batch = pack([row])
            trained = module(batch.input_ids, batch.position_ids).logprobs[0, 1:]
            assert trained.tolist() == pytest.approx(logprobs, abs=1e-5)
    losses = {}
    for name, by_row in found.items():
        pairs = [
            p
            for row, all_ in zip(held, by_row, strict=True)
            for p in zip(row.trained[1:], all_, strict=True)
        ]
        losses[name] = -mean([logprob for counts, logprob in pairs if counts])
    assert result.metrics["eval/loss"] == pytest.approx(losses["adapter"], abs=1e-6)
    assert result.metrics[LOSS_SAVED] == pytest.approx(losses["model"], abs=1e-6)
    assert abs(losses["model"] - losses["adapter"]) > 1e-4


def pairs_of(folder: Path) -> list[Any]:
    chat = chat_format(folder / "base" / "model")
    return [
        chat.pair_row(e)
        for e in load_examples([DataSpec.model_validate(HELD_OUT)], kind="preference", seed=0)
    ]


def start_in_four_bits(folder: Path) -> Any:
    """Give the reference of a qlora stage: what it began from, in 4 bits."""
    return load_for_training(folder / "base" / "model", tuning_spec("qlora"), dtype="float32")


def test_dpo_says_the_loss_of_the_saved_policy_against_its_reference(folder):
    sides = {"data": [TRAINED], "heldout": [HELD_OUT]}
    found = run_stage(folder, "dpo", QLORA, name="dpo", **sides)
    policy, losses = plain(found.model_dir), []
    reference = LogprobModel(start_in_four_bits(folder)).eval()
    for pair in pairs_of(folder):
        ratios = []
        for row in flatten_pairs([pair]):
            batch = pack([row])
            with torch.no_grad():
                sums = batch.segment_sums(
                    reference(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs
                )
            ratios.append(answer_sum(policy, row) - float(sums[0]))
        losses.append(-float(logsigmoid(torch.tensor(0.1 * (ratios[0] - ratios[1])))))
    assert found.manifest["metrics"][LOSS_SAVED] == pytest.approx(mean(losses), abs=1e-5)
    assert abs(found.manifest["metrics"]["eval/loss"] - mean(losses)) > 1e-4


def test_kto_says_the_loss_of_the_saved_policy_against_its_reference(folder):
    lines = [
        {"prompt": f"{i} plus 2", "completion": f"it is {i}", "label": i % 2 == 0}
        for i in range(20, 26)
    ]
    path = write_rows(folder / "held.jsonl", lines)
    found = run_stage(folder, "kto", QLORA, name="kto", heldout=[{"path": str(path)}])
    chat = chat_format(found.model_dir)
    examples = load_examples([DataSpec(path=str(path))], kind="unpaired", seed=0)
    rows = kto.mismatch([kto.labeled_row(chat, e) for e in examples], max_length=128)
    reference = LogprobModel(start_in_four_bits(folder))
    rows = kto.reference_rows(reference, rows, micro_tokens=512)
    policy = plain(found.model_dir)
    kl = max(mean([answer_sum(policy, kto.other(r)) - r.ref_mismatched for r in rows]), 0.0)
    losses = []
    for row in rows:
        gain = 0.1 * (answer_sum(policy, row) - row.ref - kl)
        losses.append(1.0 - float(torch.sigmoid(torch.tensor(gain if row.good else -gain))))
    assert found.manifest["metrics"][LOSS_SAVED] == pytest.approx(mean(losses), abs=1e-5)
    assert found.manifest["metrics"]["eval/loss"] != found.manifest["metrics"][LOSS_SAVED]


def test_reward_says_loss_and_normalization_of_the_saved_scorer(folder):
    sides = {"data": [TRAINED], "heldout": [HELD_OUT]}
    found = run_stage(folder, "reward", QLORA, name="reward", center_coef=0.0, **sides)
    state = load_file(found.model_dir / "model.safetensors")
    backbone = AutoModel.from_pretrained(folder / "base" / "model", dtype=torch.float32).eval()
    names = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    backbone.load_state_dict(names)

    def score(row: TokenRow) -> float:
        with torch.no_grad():
            states = backbone(input_ids=torch.tensor([row.input_ids])).last_hidden_state
        return float(states[0, -1] @ state["score.weight"][0])

    losses = []
    for pair in pairs_of(folder):
        chosen, rejected = map(score, flatten_pairs([pair]))
        losses.append(-float(logsigmoid(torch.tensor(chosen - rejected))))
    said = found.manifest["metrics"]
    assert said[LOSS_SAVED] == pytest.approx(mean(losses), abs=1e-5)
    assert abs(said["eval/loss"] - mean(losses)) > 1e-5
    chat = chat_format(folder / "base" / "model")
    examples = load_examples([DataSpec.model_validate(TRAINED)], kind="preference", seed=0)
    # norm_prompts is 4: four evenly spaced pairs of the data.
    even = [examples[i * len(examples) // 4] for i in range(4)]
    scores = [score(row) for row in flatten_pairs([chat.pair_row(e) for e in even])]
    assert said["scorer/mean"] == pytest.approx(mean(scores), abs=1e-5)


def test_without_held_out_rows_nothing_is_measured(folder):
    found = run_stage(folder, "sft", QLORA, name="blind")
    assert LOSS_SAVED not in found.manifest["metrics"]
    base = plain(folder / "base" / "model")
    assert PeftModel.from_pretrained(base, str(found.path / "adapter"))


def test_model_that_does_not_fit_is_a_warning(caplog):
    def load() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with caplog.at_level(logging.WARNING, logger="align"):
        assert read_back(load) is None
    assert f"{LOSS_SAVED} is not measured" in caplog.text
