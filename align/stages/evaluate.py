"""Stage evaluate: checkpoints answer held-out prompts through one engine and are compared."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.core import distributed
from align.core.artefacts import Artefact, write_json_atomic
from align.core.errors import ArtefactError
from align.core.log import CARDS_FILE, MetricsLog
from align.core.types import PromptRow
from align.evaluation.compare import build_summary, check_expectations
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.online.annotate import local_plan
from align.online.engine import RolloutEngine
from align.online.experience import Experience, gather_experience
from align.online.rollout import sample_groups
from align.online.scoring import score_answers
from align.online.weights import check_push
from align.recipe.schema import EvaluateStage
from align.stages.base import StageContext, StageResult, chat_format
from align.stages.card import CardInput, SampledAnswers, build_cards, headlines
from align.stages.online import build_rewards, prompt_rows, start_engine
from align.stages.preflight import preflight_evaluate
from align.stages.training import fingerprints
from reward_models.base import RewardFunction

log = logging.getLogger(__name__)
Record = dict[str, Any]


def run(spec: EvaluateStage, context: StageContext) -> StageResult:
    """Sample, score and compare; write summary.json and samples.jsonl."""
    artefacts = {name: context.artefact(name, "policy") for name in spec.models}
    baseline = artefacts[spec.baseline].model_dir
    chat = chat_format(baseline)
    prompts = prompt_rows(spec, chat, context)
    scores, judge = build_rewards(spec.scores, context), build_rewards(spec.judge, context)
    preflight_evaluate(
        spec, context, chat=chat, model_dir=baseline, prompts=prompts, scores=scores, judge=judge
    )
    metrics = context.metrics(len(spec.models))
    answers, engine_name = sample_all(spec, artefacts, prompts, context)
    reference = load_reference(spec, context)
    records: dict[str, list[Record]] = {}
    for i, (name, groups) in enumerate(answers.items()):
        policy = load_policy(artefacts[name].model_dir, dtype=spec.dtype)
        kl = kl_per_answer(spec, groups, policy=LogprobModel(policy), reference=reference)
        mine = to_records(groups, kl, scores=scores, judge=judge)
        records[name] = [r for part in distributed.gather_objects(mine) for r in part]
        _log_model(metrics, i + 1, name, records[name])
    metrics.close()
    summary = build_summary(records, baseline=spec.baseline, seed=context.seed)
    cards = reward_cards(spec, context, answers[spec.baseline], records[spec.baseline])
    summary["reward_models"] = {name: headlines(card) for name, card in cards.items()}
    summary["engine"] = engine_name
    summary["expectations"] = check_expectations(summary, spec.expect)
    if distributed.rank() == 0:
        write_json_atomic(context.out / "summary.json", summary)
        write_samples(context.out / "samples.jsonl", records)
        if cards:
            write_json_atomic(context.out / CARDS_FILE, cards)
        for line in summary["expectations"]:
            log.info("expected %s in %s: %s", line["key"], line["band"], _verdict(line))
    held = {
        f"{model}/{name}": value[0]
        for model, row in [*summary["models"].items(), *summary["reward_models"].items()]
        for name, value in row.items()
        if value[0] is not None
    }
    return StageResult(held, fingerprints(spec.prompts, spec.pairs, spec.sets))


def _verdict(line: Record) -> str:
    return f"{line['value']} {'holds' if line['holds'] else 'DOES NOT HOLD'}"


def sample_all(
    spec: EvaluateStage,
    artefacts: dict[str, Artefact],
    prompts: Sequence[PromptRow],
    context: StageContext,
) -> tuple[dict[str, Experience], str]:
    """Let each checkpoint answer this rank's prompts; one engine takes their weights in turn."""
    answers: dict[str, Experience] = {}
    first = len(prompts) * distributed.rank() // distributed.world_size()
    mine = distributed.shard(prompts)
    engine: RolloutEngine | None = None
    held: Artefact | None = None
    for version, (name, artefact) in enumerate(artefacts.items()):
        chat = chat_format(artefact.model_dir)
        same_tokens(mine[:8], prompt_rows_like(mine[:8], chat), name, spec.baseline)
        if engine is None or held is None or _config(held) != _config(artefact):
            if engine is not None:
                engine.close()
            engine = start_engine(spec, artefact.model_dir, chat, context)
            held = artefact
        with engine.awake():
            if held is not artefact:
                engine.load_weights(saved_weights(artefact.model_dir), version=version)
                probe = mine[0].input_ids
                check_push(engine, probe, trainer_logprobs(artefact, probe, spec), dtype=spec.dtype)
            # Every checkpoint draws with the same seeds, so that comparisons are paired.
            groups = sample_groups(
                engine,
                mine,
                n=spec.samples,
                step=0,
                seed=context.seed,
                sampling=spec.sampling,
                stop_token_ids=chat.stop_token_ids,
                first_position=first,
            )
        answers[name] = gather_experience(mine, groups, first_group=first)
        log.info("%s: %d answers sampled", name, len(answers[name].completions))
    assert engine is not None
    engine_name = engine.name
    engine.close()
    return answers, engine_name


def _config(artefact: Artefact) -> dict[str, Any]:
    return json.loads((artefact.model_dir / "config.json").read_text(encoding="utf-8"))


def prompt_rows_like(rows: Sequence[PromptRow], chat: Any) -> list[list[int]]:
    """Render the prompts of ``rows`` with another checkpoint's tokenizer and template."""
    return [list(chat.prompt_ids(row.prompt)) for row in rows]


def same_tokens(
    rows: Sequence[PromptRow], again: Sequence[Sequence[int]], name: str, baseline: str
) -> None:
    """Raise ArtefactError where another checkpoint renders the prompts to other tokens."""
    for row, ids in zip(rows, again, strict=True):
        if list(row.input_ids) != list(ids):
            raise ArtefactError(
                f"model '{name}' renders {row.source} to other tokens than '{baseline}' does; "
                "compare checkpoints of one tokenizer and template"
            )


def saved_weights(model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a saved model, file by file."""
    from safetensors import safe_open

    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


@torch.no_grad()
def trainer_logprobs(artefact: Artefact, ids: Sequence[int], spec: EvaluateStage) -> list[float]:
    """Give the log-probabilities of tokens 1 .. T-1 under a saved model."""
    model = LogprobModel(load_policy(artefact.model_dir, dtype=spec.dtype)).eval()
    row = torch.tensor([list(ids)], device=distributed.device())
    positions = torch.arange(row.shape[1], device=row.device).unsqueeze(0)
    return model(row, positions).logprobs[0, 1:].tolist()


def load_reference(spec: EvaluateStage, context: StageContext) -> LogprobModel:
    """Load the policy that KL is measured against."""
    artefact = context.artefact(spec.reference or spec.baseline, "policy")
    return LogprobModel(load_policy(artefact.model_dir, dtype=spec.dtype)).eval()


@torch.no_grad()
def kl_per_answer(
    spec: EvaluateStage, answers: Experience, *, policy: LogprobModel, reference: LogprobModel
) -> list[float | None]:
    """Estimate KL(policy || reference) in nats per answer: log-ratio summed over its tokens.

    The estimate is unbiased for answers drawn from the policy itself, so it is given at
    temperature 1 only; otherwise None.
    """
    if spec.sampling.temperature != 1.0:
        return [None] * len(answers.completions)
    policy.eval()
    plan = local_plan(answers, range(len(answers.lengths)), 16384)
    out = torch.zeros(answers.input_ids.shape)
    for rows in plan:
        batch = answers.micro(rows, {})
        log_ratio = (
            policy(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs
            - reference(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs
        )
        answers.spread(rows, log_ratio, out)
    return out.sum(1).tolist()


def to_records(
    answers: Experience,
    kl: Sequence[float | None],
    *,
    scores: Sequence[RewardFunction],
    judge: Sequence[RewardFunction],
) -> list[Record]:
    """Give one record per answer with everything that was measured of it."""
    columns = score_answers(answers.prompts, answers.completions, scores).by_name
    verdicts = score_answers(answers.prompts, answers.completions, judge).total
    groups = answers.group_ids.tolist()
    seen: dict[int, int] = {}
    records = []
    for i, (prompt, answer) in enumerate(zip(answers.prompts, answers.completions, strict=True)):
        sample = seen[groups[i]] = seen.get(groups[i], -1) + 1
        records.append(
            {
                "prompt_index": groups[i],
                "sample_index": sample,
                "prompt": prompt.prompt,
                "completion": answer.text,
                "scores": {name: values[i] for name, values in columns.items()},
                "judge": verdicts[i],
                "length": len(answer.token_ids),
                "kl": kl[i],
                "finish_reason": answer.finish_reason,
            }
        )
    return records


def _log_model(metrics: MetricsLog, step: int, name: str, records: Sequence[Record]) -> None:
    found = {
        f"eval/{name}/{column}": sum(known) / len(known)
        for column in records[0]["scores"]
        if (known := [r["scores"][column] for r in records if r["scores"][column] is not None])
    }
    first = records[0]
    sample = {"prompt": first["prompt"], "completion": first["completion"], "score": first["judge"]}
    metrics.log(step, found, sample=sample)


def write_samples(path: Path, records: dict[str, list[Record]]) -> None:
    """Write every answer, one JSON object a line."""
    with path.open("w", encoding="utf-8") as f:
        for model, rows in records.items():
            for row in rows:
                f.write(json.dumps({"model": model, **row, "score": row["judge"]},
                                   ensure_ascii=False) + "\n")  # fmt: skip


def reward_cards(
    spec: EvaluateStage, context: StageContext, answers: Experience, records: Sequence[Record]
) -> dict[str, dict[str, Any]]:
    """Measure the reward models; the baseline's answers give the best-of-n curve by the judge."""
    if not spec.reward_models:
        return {}
    rows = [
        [*prompt.input_ids, *answer.token_ids]
        for prompt, answer in zip(answers.prompts, answers.completions, strict=True)
    ]
    everyone = [row for part in distributed.gather_objects(rows) for row in part]
    groups = [record["prompt_index"] for record in records]
    sampled = SampledAnswers(everyone, groups, [record["judge"] for record in records])
    given = CardInput(
        spec.pairs, spec.sets, spec.max_length, spec.max_lost_frac, context.seed,
        sampled if spec.samples > 1 else None,
    )  # fmt: skip
    models = {name: context.artefact(name, "reward_model") for name in spec.reward_models}
    return build_cards(models, given)
