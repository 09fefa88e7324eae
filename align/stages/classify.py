"""Stage classify: train a text classifier with a new head on a decoder or an encoder."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align.core import distributed
from align.core.artifacts import Artifact
from align.core.errors import DataError
from align.core.types import Example, TokenRow
from align.data.load import fingerprints
from align.data.render.content import check_plain
from align.evaluation.classes import class_scores
from align.losses.supervised import class_loss
from align.models.classifier import ClassLogits, classifier_from, save_classifier
from align.models.loading import load_tokenizer, set_dropout
from align.preflight.classes import class_checks
from align.preflight.disk import disk_checks
from align.recipe.schema import ClassifyStage
from align.stages.base import Prepared, StageContext, StageResult
from align.stages.best import BestWeights, build_stopping, stopping_notes, tidy_after
from align.stages.offline import (
    add_tuner_to_backbone,
    load_backbone,
    offline_rows,
    refuse_random,
    run_offline,
    saved_loss,
)
from align.stages.saving import save_streamed, saved_tensors
from align.training.batch import PackedBatch, pack
from align.training.infer import map_rows
from align.training.own_code import own_losses
from align.training.task import OfflineTask
from align.tuning.export import full_weights
from align.tuning.files import num_trained
from align.tuning.loading import load_classifier, quantization
from reward_models.limits import LimitError, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True, slots=True)
class ClassRow(TokenRow):
    """A tokenized text and the name of its class."""

    label: str = ""


def prepare(spec: ClassifyStage, context: StageContext) -> Prepared:
    """Load the labeled texts and put a new head on the policy or encoder ``spec.init``."""
    source = load_backbone(spec, context)
    render = partial(class_row, load_tokenizer(source.model_dir))
    data = offline_rows(spec, context, render=render)
    classes = classes_of(data.training, data.heldout)
    model = build_classifier(spec, source, classes, seed=context.seed)
    loss_fn = partial(labeled_loss, label_smoothing=spec.label_smoothing, own=spec.own_loss)
    numbered = partial(collate, classes)
    task = OfflineTask(data.training, data.heldout, length_of, numbered, loss_fn, padded=True)
    module = ClassLogits(model)
    return Prepared(
        train=partial(
            train,
            spec,
            context,
            source=source,
            classes=classes,
            model=model,
            module=module,
            task=task,
        ),
        checks=[
            *data.checks,
            *disk_checks(spec, model, context.run_dir / context.name),
            *class_checks(
                spec, module, backbone=model.base_model, task=task, classes=classes, source=source
            ),
        ],
        notes=data.notes,
    )


def train(
    spec: ClassifyStage,
    context: StageContext,
    *,
    source: Artifact,
    classes: list[str],
    model: "PreTrainedModel",
    module: ClassLogits,
    task: OfflineTask[Any],
) -> StageResult:
    """Train a classifier, save it, and score the saved model on the held-out rows."""
    write = partial(save, spec, model, classes=classes, source=source)
    best = BestWeights(write, context.out)
    stopping = build_stopping(spec, best)
    # Training.
    trained, total = num_trained(model)
    final = run_offline(module, task, spec, context=context, stopping=stopping)
    final |= {"tuning/trained_params": float(trained), "tuning/params": float(total)}
    # Saving: the last weights, or the best ones under early stopping.
    notes: dict[str, Any] = {"classes": classes}
    if stopping is None:
        write(out=context.out)
    else:
        best.restore(stopping.best_step)
        notes |= stopping_notes(stopping)
    # Scores on the held-out rows, of the model as it was saved.
    if task.heldout:
        if stopping is not None or spec.tuning.method == "qlora":
            # The saved model may differ from the one in memory: an earlier step, or not in 4 bits.
            kept = load_classifier(context.out / "model", getattr(torch, spec.dtype))
            module = ClassLogits(kept.to(distributed.device()))
        if spec.tuning.method == "qlora":
            final |= saved_loss(module, task, spec.micro_tokens)
        probs = predict(module, task, spec.micro_tokens)
        notes["heldout"] = judge(probs, task.heldout, classes, seed=context.seed, out=context.out)
        final |= {f"eval/{name}": notes["heldout"][name][0] for name in ("accuracy", "macro_f1")}
    tidy = tidy_after(stopping, best)
    return StageResult(final, fingerprints(spec.data, spec.heldout), notes, tidy)


def class_row(tokenizer: "PreTrainedTokenizerBase", example: Example) -> ClassRow:
    """Return a row from a plain text, or from a conversation with the chat template."""
    text = example.completion
    assert text is not None
    if not isinstance(text, str):
        check_plain(example, reader="a classifier")
        if tokenizer.chat_template is None:
            if [turn["role"] for turn in text] != ["user"]:
                raise DataError(
                    f"{example.source}: a conversation, but the tokenizer has no chat template. "
                    "A single user turn is read as plain text; for more turns, use rows with "
                    "'text' instead of 'messages'"
                )
            # One user turn is a plain text.
            text = str(text[0]["content"])
    if isinstance(text, str):
        ids = tokenizer(text)["input_ids"]
    else:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in text]
        try:
            written = render_chat(tokenizer, turns, tokenize=False)
        except LimitError as error:
            raise DataError(f"{example.source}: {error}") from error
        # The template writes the special tokens itself.
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    label = example.columns["label"]
    return ClassRow(tuple(ids), (False,) * len(ids), source=example.source, label=label)


def classes_of(rows: Sequence[ClassRow], watched: Sequence[ClassRow]) -> list[str]:
    """Return the classes of the training rows, in numeric or alphabetical order.

    Raises:
        DataError: there is only one class, or a held-out row has an unknown one.
    """
    found = sorted({row.label for row in rows}, key=_by_number)
    if len(found) < 2:
        raise DataError(
            f"{rows[0].source}: every training row has class {found[0]!r}; expected two or more"
        )
    for row in watched:
        if row.label not in found:
            raise DataError(
                f"{row.source}: class {row.label!r} is in no training row; known classes are "
                f"{', '.join(found[:20])}"
            )
    return found


def _by_number(name: str) -> tuple[bool, int, str]:
    # Numbers by value and before words: 2 precedes 10.
    is_number = name.removeprefix("-").isdecimal()
    return (not is_number, int(name) if is_number else 0, name)


def build_classifier(
    spec: ClassifyStage, source: Artifact, classes: Sequence[str], *, seed: int
) -> Any:
    """Return the model of ``source`` with a new head and the adapter of ``tuning``.

    Raises:
        ArtifactError: weights below the head are missing, and ``tuning`` would not train them.
    """
    torch.manual_seed(distributed.derive_seed(seed, "head"))
    held = quantization(spec.tuning, spec.dtype)
    model, missing = classifier_from(source.model_dir, classes, dtype=spec.dtype, quantization=held)
    refuse_random(missing, spec, source)
    if spec.keep.dropout:
        set_dropout(model, spec.keep.dropout)
    tuning_seed = distributed.derive_seed(seed, "tuning")
    tuned = add_tuner_to_backbone(spec, model.base_model, seed=tuning_seed)
    # Only the base gets the adapter; the new head is trained in full.
    setattr(model, model.base_model_prefix, tuned)
    return model.to(distributed.device())


def length_of(row: ClassRow) -> int:
    """Return the number of tokens in a row."""
    return len(row.input_ids)


def collate(
    classes: Sequence[str], rows: Sequence[ClassRow], batch: Sequence[ClassRow]
) -> PackedBatch:
    """Pack rows with their class numbers; the global count is the number of rows in the batch."""
    return pack(
        rows,
        counts={"rows": float(len(batch))},
        per_sequence={"label": [float(classes.index(row.label)) for row in rows]},
    )


def labeled_loss(
    model: nn.Module, batch: PackedBatch, *, label_smoothing: float = 0.0, own: str | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this micro-batch's part of the mean loss and of the accuracy.

    Args:
        model: returns the logits. batch: packed rows.
        label_smoothing: applied only during training; the held-out loss is the plain one.
        own: the user's function of logits and labels; None is cross-entropy.
    """
    # (num, C); an empty micro-batch has one placeholder row, which is cut off.
    logits = model(batch.input_ids, batch.position_ids)[: batch.num]
    labels = batch.per_sequence["label"].long()
    smoothing = label_smoothing if model.training else 0.0
    right = (logits.detach().argmax(-1) == labels).sum()
    if own is None:
        loss = class_loss(logits, labels, batch.counts["rows"], label_smoothing=smoothing)
    else:
        options = {"label_smoothing": smoothing}
        losses = own_losses(own, logits, labels, each="rows", options=options)
        loss = losses.sum() / batch.counts["rows"] + 0.0 * logits.sum()
    return loss, {"accuracy": right / batch.counts["rows"]}


def predict(module: nn.Module, task: OfflineTask[Any], micro_tokens: int) -> Tensor:
    """Return the class probabilities of each held-out row, shape (rows, C).

    Every rank runs all rows, because ZeRO-3 needs the same number of passes on each rank.
    """
    rows = task.heldout
    found = map_rows(
        module,
        rows,
        lambda model, batch: list(model(batch.input_ids, batch.position_ids).softmax(-1).cpu()),
        length=task.length,
        collate=lambda micro: task.collate(micro, rows),
        micro_tokens=micro_tokens,
        padded=True,
        share=False,
    )
    return torch.stack(found)


def judge(
    probs: Tensor, rows: Sequence[ClassRow], classes: Sequence[str], *, seed: int, out: Path
) -> dict[str, Any]:
    """Write the prediction for each held-out row and return the scores."""
    chosen = probs.argmax(-1).tolist()
    if distributed.rank() == 0:
        with (out / PREDICTIONS).open("w", encoding="utf-8") as file:
            for row, i, p in zip(rows, chosen, probs.tolist(), strict=True):
                line = {"source": row.source, "label": row.label, "predicted": classes[i]}
                line["probs"] = {name: round(x, 6) for name, x in zip(classes, p, strict=True)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    labels = [classes.index(row.label) for row in rows]
    return class_scores(labels, chosen, classes, seed=seed)


def save(
    spec: ClassifyStage,
    model: "PreTrainedModel",
    *,
    classes: Sequence[str],
    source: Artifact,
    out: Path,
) -> None:
    """Write model/ and, with an adapter, adapter/ below ``out``; every rank must call this."""
    write = partial(
        save_classifier,
        classes=classes,
        source_dir=source.model_dir,
        directory=out / "model",
        dtype=spec.dtype,
    )
    save_streamed(_named(model, source.model_dir), write, adapted=model.base_model, out=out)


def _named(model: "PreTrainedModel", source_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield weights under transformers' names: the base below its prefix, then the head's own."""
    prefix = model.base_model_prefix
    for name, tensor in saved_tensors(model.base_model, source_dir):
        yield f"{prefix}.{name}", tensor
    for part, head in model.named_children():
        if part != prefix:
            for name, tensor in full_weights(head):
                yield f"{part}.{name}", tensor
