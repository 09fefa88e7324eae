"""Stage reward: train a reward model on pairs, labeled responses or labeled solution steps.

Its backbone is a decoder or an encoder. With an encoder, prompt and response are a pair of texts,
batches are padded, and the score of the whole text is repeated at each of its tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align.core import distributed
from align.core.artifacts import Artifact
from align.core.errors import DataError
from align.core.types import Example, PairRow, TokenRow
from align.data.load import fingerprints
from align.data.render.chat import ChatFormat
from align.data.render.encoder_pairs import PairedFormat
from align.models.heads import scorer_from, scorer_on_encoder, values_of
from align.models.loading import set_dropout
from align.preflight.checks import spread
from align.preflight.disk import disk_checks
from align.preflight.paired import paired_checks
from align.recipe.schema import RewardStage
from align.stages.base import Prepared, StageContext, StageResult
from align.stages.best import BestWeights, build_stopping, stopping_notes, tidy_after
from align.stages.offline import (
    OfflineRows,
    add_tuner_to_backbone,
    load_backbone,
    offline_rows,
    read_back,
    refuse_random,
    run_offline,
    saved_loss,
)
from align.stages.preflight import offline_checks, row_views
from align.stages.reward.label_noise import noise_report
from align.stages.reward.normalize import Numbers, normalization, sampled_rows
from align.stages.reward.tasks import (
    LabeledAnswer,
    LabeledSteps,
    RowFormat,
    WeightedPair,
    class_weights,
    collate_answers,
    collate_pairs,
    collate_steps,
    final_scores,
    head_weights,
    labeled_loss,
    pair_loss,
    scorer_format,
    steps_loss,
)
from align.stages.saving import save_trained_scorer
from align.training.batch import flatten_pairs, pack, pair_length, trim_after_last_trained
from align.training.deepspeed import config_of_shards
from align.training.infer import map_rows
from align.training.task import OfflineTask
from align.tuning.files import num_trained, with_adapter
from align.tuning.loading import quantization, tokens_to_train
from align.tuning.merging import has_adapter
from reward_models.process import step_ends
from reward_models.scalar import RewardModel


def prepare(spec: RewardStage, context: StageContext) -> Prepared:
    """Load the labeled data and put new heads on the model of ``spec.init``."""
    source = load_backbone(spec, context)
    chat = scorer_format(source)
    build = {"pairs": pair_task, "answers": answer_task, "steps": step_task}[spec.supervision]
    task, data = build(spec, context, chat)
    model = fresh_scorer(spec, source, context)
    module = values_of(model)
    if isinstance(chat, PairedFormat):
        checks = paired_checks(spec, chat, module=module, model=model, task=task, source=source)
    else:
        checks = offline_checks(
            spec,
            chat=chat,
            source=source,
            module=module,
            model=model.backbone,
            task=task,
            examples=data.examples,
        )
    return Prepared(
        train=partial(train, spec, context, source=source, chat=chat, task=task, model=model),
        checks=[*data.checks, *disk_checks(spec, model, context.run_dir / context.name), *checks],
        views=lambda: row_views(task.rows, chat),
        notes=data.notes,
    )


def train(
    spec: RewardStage,
    context: StageContext,
    *,
    source: Artifact,
    chat: RowFormat,
    task: OfflineTask[Any],
    model: RewardModel,
) -> StageResult:
    """Train a reward model, measure its scores on reference responses, and save it."""
    notes: dict[str, Any] = {}
    # Label noise: cross-validated before the training of the model itself.
    if spec.noise_folds:
        pairs = [row.pair for row in task.rows]
        part = partial(train_part, spec=spec, source=source)
        notes["noise"] = noise_report(pairs, context, folds=spec.noise_folds, train=part)
    # Training.
    best = BestWeights(partial(save_scorer, spec, model, source=source), context.out)
    stopping = build_stopping(spec, best)
    trained, total = num_trained(model)
    final = run_offline(values_of(model), task, spec, context=context, stopping=stopping)
    final |= {"tuning/trained_params": float(trained), "tuning/params": float(total)}
    # The saved model may differ from the one in memory: an earlier step, or not in 4 bits.
    if stopping is not None:
        best.restore(stopping.best_step)
        model = saved_scorer(spec, context.out / "model")
        notes |= stopping_notes(stopping)
    elif spec.tuning.method == "qlora":
        save_scorer(spec, model, context.out, source=source)
        model = read_back(partial(saved_scorer, spec, context.out / "model")) or model
    if spec.tuning.method == "qlora" and not has_adapter(model.backbone):
        final |= saved_loss(values_of(model), task, spec.micro_tokens)
    # Mean and std of the saved model's scores on reference responses.
    numbers = reference_numbers(
        spec, context, source=source, chat=chat, model=model, rows=task.rows
    )
    save_scorer(spec, model, context.out, source=source, numbers=numbers)
    for name, value in zip(("mean", "std"), numbers or (0.0, 1.0), strict=True):
        many = value if isinstance(value, list) else [value]
        final[f"scorer/{name}"] = sum(many) / len(many)
    tidy = tidy_after(stopping, best)
    return StageResult(final, fingerprints(spec.data, spec.heldout), notes, tidy)


def train_part(
    pairs: list[PairRow], context: StageContext, *, spec: RewardStage, source: Artifact
) -> RewardModel:
    """Return a one-head reward model trained on some of the pairs, for the stage's epochs."""
    steps = spec.steps
    if steps is not None:
        # A part trains on (folds - 1) / folds of the pairs, so it gets that fraction of the steps.
        steps = max(1, round(steps * (spec.noise_folds - 1) / spec.noise_folds))
    # One head without checkpoints: a part is short, and only its scores are used.
    plain = spec.model_copy(update={"heads": 1, "checkpoint_every": 0, "steps": steps})
    rows = [WeightedPair(pair, (1.0,)) for pair in pairs]
    model = fresh_scorer(plain, source, context)
    task = OfflineTask(
        rows,
        [],
        _pair_length,
        collate_pairs,
        partial(pair_loss, plain),
        padded=model.reads == "first",
    )
    run_offline(values_of(model), task, plain, context=context, stopping=None)
    return model


def fresh_scorer(spec: RewardStage, source: Artifact, context: StageContext) -> RewardModel:
    """Put fresh heads on the model of ``source``, by the seed of the stage."""
    torch.manual_seed(distributed.derive_seed(context.seed, "head"))
    return new_reward_model(spec, source, seed=distributed.derive_seed(context.seed, "tuning"))


def pair_task(
    spec: RewardStage, context: StageContext, chat: RowFormat
) -> tuple[OfflineTask[Any], OfflineRows]:
    """Return the task of learning which of two responses is better."""
    data = offline_rows(spec, context, render=chat.pair_row)
    ties = [pair.source for pair in (*data.training, *data.heldout) if pair.tie]
    if ties and spec.tie_margin is None:
        raise DataError(
            f"{ties[0]}: tie: true, but tie_margin is not set ({len(ties)} ties in all). Set "
            "tie_margin (with 1.1, equal responses tie half of the time) or remove these pairs"
        )
    task = OfflineTask(
        weighted(data.training, spec, context),
        # Bootstrap samples are for training: a held-out pair counts once for each head.
        [WeightedPair(pair, (1.0,) * spec.heads) for pair in data.heldout],
        _pair_length,
        collate_pairs,
        partial(pair_loss, spec),
        padded=isinstance(chat, PairedFormat),
    )
    return task, data


def weighted(
    pairs: Sequence[PairRow], spec: RewardStage, context: StageContext
) -> list[WeightedPair]:
    """Return the pairs with their weights in the bootstrap sample of each head."""
    weights = head_weights(len(pairs), spec.heads, seed=context.seed)
    return [WeightedPair(*both_of) for both_of in zip(pairs, weights, strict=True)]


def _pair_length(row: WeightedPair) -> int:
    return pair_length(row.pair)


def answer_task(
    spec: RewardStage, context: StageContext, chat: RowFormat
) -> tuple[OfflineTask[Any], OfflineRows]:
    """Return the task of learning whether a single response is good."""
    data = offline_rows(spec, context, render=partial(_labeled_answer, chat))
    try:
        classes = class_weights(data.training)
    except ValueError as error:
        raise DataError(f"{context.name}: {error}") from error
    # Each head of an ensemble trains on its own bootstrap sample; held-out rows count once.
    weights = head_weights(len(data.training), spec.heads, seed=context.seed)
    rows = [replace(row, head_weights=w) for row, w in zip(data.training, weights, strict=True)]
    heldout = [replace(row, head_weights=(1.0,) * spec.heads) for row in data.heldout]
    loss = partial(labeled_loss, spec=spec, class_weights=classes)
    task = OfflineTask(
        rows, heldout, _length, collate_answers, loss, padded=isinstance(chat, PairedFormat)
    )
    return task, data


def _labeled_answer(chat: RowFormat, example: Example) -> LabeledAnswer:
    row = trim_after_last_trained(chat.sft_row(example))
    return LabeledAnswer(row.input_ids, row.trained, row.source, good=bool(example.label))


def _length(row: TokenRow) -> int:
    return len(row.input_ids)


def step_task(
    spec: RewardStage, context: StageContext, chat: RowFormat
) -> tuple[OfflineTask[Any], OfflineRows]:
    """Return the task of learning whether a solution is correct so far, from labeled steps."""
    assert isinstance(chat, ChatFormat), "an encoder cannot score steps"
    render = partial(_labeled_steps, chat, spec.step_separator)
    data = offline_rows(spec, context, render=render)
    loss = partial(steps_loss, own=spec.own_loss)
    task = OfflineTask(data.training, data.heldout, _length, collate_steps, loss)
    return task, data


def _labeled_steps(chat: ChatFormat, separator: str, example: Example) -> LabeledSteps:
    steps, labels = example.columns["steps"], example.columns["step_labels"]
    if any(separator in step for step in steps):
        raise DataError(
            f"{example.source}: a step contains the separator {separator!r}. Split it there, or "
            "set another step_separator"
        )
    # Rendered as one response whose steps are joined by the separator.
    row = trim_after_last_trained(chat.sft_row(replace(example, completion=separator.join(steps))))
    first = row.trained.index(True)
    ends = step_ends(row.input_ids[first:], chat.tokenizer, separator)
    if len(ends) != len(steps):
        raise DataError(
            f"{example.source}: {len(steps)} steps, but only {len(ends)} can be found in the "
            f"tokens: {separator!r} is not a token of its own. Set another step_separator"
        )
    # Step ends count from the response; positions in the row count from its start.
    places = tuple(first + end for end in ends)
    return LabeledSteps(row.input_ids, row.trained, row.source, ends=places, labels=tuple(labels))


def new_reward_model(spec: RewardStage, source: Artifact, *, seed: int) -> RewardModel:
    """Return the model of ``source`` with new heads and the adapter of ``tuning``."""
    held, tokens = quantization(spec.tuning, spec.dtype), []
    options: Any = {"dtype": spec.dtype, "num_heads": spec.heads, "shards": config_of_shards(spec)}
    if source.manifest["kind"] == "encoder":
        model, missing = scorer_on_encoder(source.model_dir, quantization=held, **options)
        refuse_random(missing, spec, source)
    else:
        model = scorer_from(source.model_dir, quantization=held, **options)
        tokens = tokens_to_train(model.backbone, source.model_dir, spec.tuning)
    if spec.keep.dropout:
        # Of the backbone; an adapter has a dropout of its own.
        set_dropout(model.backbone, spec.keep.dropout)
    model.backbone = add_tuner_to_backbone(spec, model.backbone, seed=seed, tokens=tokens)
    return model.to(distributed.device())


def saved_scorer(spec: RewardStage, model_dir: Path) -> RewardModel:
    """Load a reward model that this stage has saved, with its adapter if that is not merged."""
    shards = config_of_shards(spec)
    model = scorer_from(model_dir, dtype=spec.dtype, num_heads=spec.heads, shards=shards)
    model.backbone = with_adapter(model.to(distributed.device()).backbone, model_dir)
    return model


def reference_numbers(
    spec: RewardStage,
    context: StageContext,
    *,
    source: Artifact,
    chat: RowFormat,
    model: RewardModel,
    rows: Sequence[Any],
) -> tuple[Numbers, Numbers] | None:
    """Return the mean and std of the reference scores, or None for a process reward model."""
    if spec.supervision == "steps" or spec.norm_prompts == 0:
        return None
    asked = spread(rows, spec.norm_prompts)
    if spec.norm_sampling is not None:
        assert isinstance(chat, ChatFormat), "an encoder cannot sample responses"
        references = sampled_rows(spec, context, model_dir=source.model_dir, chat=chat)
    elif spec.supervision == "pairs":
        references = flatten_pairs([row.pair for row in asked])
    else:
        references = asked
    # share=False: every rank scores all rows, which are few, and gets the same numbers.
    scores = map_rows(
        values_of(model),
        references,
        lambda values, batch: final_scores(
            values(batch.input_ids, batch.position_ids), batch
        ).tolist(),
        length=_length,
        collate=pack,
        micro_tokens=spec.micro_tokens,
        padded=model.reads == "first",
        share=False,
    )
    return normalization(torch.tensor(scores, dtype=torch.float64))


def save_scorer(
    spec: RewardStage,
    model: RewardModel,
    out: Path,
    *,
    source: Artifact,
    numbers: tuple[Numbers, Numbers] | None = None,
) -> None:
    """Write model/ and, with an adapter, adapter/ below ``out``; every rank must call this.

    Args:
        numbers: mean and std of the reference scores; None leaves the scores as they are.
    """
    if numbers is not None:
        model.set_normalization(mean=numbers[0], std=numbers[1])
    model.extra = {"supervision": spec.supervision}
    if spec.supervision == "steps":
        model.extra["step_separator"] = spec.step_separator
    save_trained_scorer(model, source_dir=source.model_dir, out=out)
