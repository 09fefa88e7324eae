"""Stage self_instruct: generate new instructions from a few seed tasks (arXiv:2212.10560).

In each round the model continues lists of known instructions. Candidates are rejected if they are
similar to a known instruction, too short, too long, or not meant for a text model; the model then
responds to the others. Deviations from the paper: classification tasks are not treated separately,
and an instruction and its input are one text.
"""

import logging
import random
import string
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from align.core.artifacts import Artifact
from align.core.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from align.core.distributed import derive_seed, stop_requested
from align.core.errors import DataError, Preempted
from align.core.log import MetricsLog
from align.core.types import Completion, PromptRow, Text, Turn
from align.data.load import fingerprints, load_examples
from align.data.render.chat import ChatFormat
from align.data.text.ngrams import word_texts
from align.data.text.similarity import nearest
from align.preflight.checks import Check, Finding, spread
from align.preflight.tokens import prompt_checks
from align.recipe.schema import SelfInstructStage
from align.sampling.engine import RolloutEngine
from align.sampling.rollout import sample_groups
from align.stages.base import Prepared, StageContext, StageResult, chat_format
from align.stages.data.rows import Ledger, answer_text, num_questions, question, write_data
from align.stages.rollouts import start_engine


def _list_prompt(tasks: Sequence[dict[str, Any]], spec: SelfInstructStage) -> str:
    """Return a prompt that lists tasks and ends where the next instruction begins."""
    item = spec.wording.item
    lines = [
        item.replace("{number}", str(i)).replace("{instruction}", task["instruction"])
        for i, task in enumerate(tasks, start=1)
    ]
    opening = item.partition("{instruction}")[0].replace("{number}", str(len(tasks) + 1))
    # Tokenizers attach a space to the following word, so the model must generate it.
    return (spec.wording.head + "".join(lines) + opening).rstrip(" ")


def _first_item(completion: Completion, spec: SelfInstructStage) -> tuple[str, bool]:
    """Return the text up to the end of the first list item, and whether the item is complete."""
    text, end, _ = completion.text.partition(spec.wording.item.partition("{instruction}")[2])
    return one_line(text), bool(end) or completion.finish_reason == "stop"


def refusal(
    text: str, *, whole: bool, known: Sequence[dict[str, Any]], spec: SelfInstructStage
) -> tuple[str | None, dict[str, Any]]:
    """Return why an instruction is rejected, or None, and its similarity to the nearest known one.

    Args:
        text: the instruction. whole: False if it was cut off.
        known: instructions so far. spec: bounds of the recipe.
    """
    found = word_texts(text)
    if not whole:
        return "cut", {}
    if len(found) < spec.min_words:
        return "too short", {}
    if len(found) > spec.max_words:
        return "too long", {}
    if text[0] in string.punctuation:
        return "begins with punctuation", {}
    unfit = sorted(set(found) & {word.lower() for word in spec.refuse_words})
    if unfit:
        return "not for a text model", {"words": unfit}
    # ROUGE-L with every known instruction, as in the paper: the largest one decides.
    place, value = nearest(found, [word_texts(task["instruction"]) for task in known])
    details = {"rouge_l": round(value, 4), "nearest": known[place]["name"] if place >= 0 else None}
    return ("like a known one" if value >= spec.novelty else None), details


def finished(completion: Completion, spec: SelfInstructStage) -> tuple[str, bool]:
    """Return the response, and whether the model finished it."""
    if spec.answer == "chat":
        return completion.text.strip(), completion.finish_reason == "stop"
    text, end, _ = completion.text.partition(spec.wording.solved.partition("{answer}")[2])
    return text.strip(), bool(end) or completion.finish_reason == "stop"


def one_line(text: str) -> str:
    """Return a text on one line, its words separated by single spaces."""
    return " ".join(text.split())


log = logging.getLogger(__name__)
NUM_PROBES = 4
"""Number of lists that the preflight check samples from."""
PROBE_STEP = 10**6
"""Step number for the seeds of these samples; no round uses it."""


@dataclass(slots=True)
class Grown:
    """Known tasks: the seeds, then the generated ones with their provenance."""

    seeds: list[dict[str, Any]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """Every known task: ``instruction``, ``answer``, ``name``."""
        return [*self.seeds, *self.rows]


def prepare(spec: SelfInstructStage, context: StageContext) -> Prepared:
    """Load the seeds and start the engine with the policy ``spec.init``."""
    source = context.artifact(spec.init, "policy")
    chat = chat_format(source.model_dir)
    grown = _read_seeds(spec, context)
    start = restore(grown, context)
    engine = context.resources.enter_context(
        closing(start_engine(spec, source.model_dir, chat, context=context))
    )
    sampler = Sampler(engine, chat, spec, context.seed)
    return Prepared(
        train=partial(grow, spec, context, sampler, grown=grown, start=start, source=source),
        checks=checks(grown, sampler, source.model_dir),
    )


def grow(
    spec: SelfInstructStage,
    context: StageContext,
    sampler: "Sampler",
    *,
    grown: Grown,
    start: int,
    source: Artifact,
) -> StageResult:
    """Generate ``spec.target`` rows from the seeds, starting with round ``start``."""
    metrics = context.metrics(spec.target)
    # One line of metrics per round, numbered by the rows kept so far.
    if start:
        metrics.rewind(len(grown.rows), lines=start)
    for number in range(start, spec.max_rounds):
        if len(grown.rows) >= spec.target:
            break
        _one_round(grown, sampler, number)
        _log_round(metrics, grown, number)
        save(grown, number + 1, context)
        if stop_requested():
            raise Preempted(f"stopped by a signal after round {number + 1}. Run again to resume")
    metrics.close()
    if len(grown.rows) < spec.target:
        log.warning(
            "%s: only %d of %d rows after %d rounds; rejected: %s",
            context.name,
            len(grown.rows),
            spec.target,
            spec.max_rounds,
            grown.ledger.counts(),
        )
    origin = {"stage": "self_instruct", "model": source.manifest["spec_hash"]}
    count = write_data(context, (to_row(row, origin) for row in grown.rows), grown.ledger)
    found = {"rows/kept": float(count), "rows/target": float(spec.target)}
    found |= {f"left/{reason}": float(n) for reason, n in grown.ledger.counts().items()}
    return StageResult(found, fingerprints(spec.seeds))


def _read_seeds(spec: SelfInstructStage, context: StageContext) -> Grown:
    """Return the distinct seed tasks; conversations of several turns are dropped.

    Raises:
        DataError: there are fewer seeds than a list of examples needs.
    """
    found: dict[str, dict[str, Any]] = {}
    ledger = Ledger()
    for example in load_examples(spec.seeds, kind="sft", seed=context.seed):
        text = one_line(question(example))
        if num_questions(example) > 1:
            ledger.add(example.source, "seed of several turns")
        elif text in found:
            ledger.add(example.source, "seed twice", of=found[text]["name"])
        else:
            answer = answer_text(example)
            found[text] = {"instruction": text, "answer": answer, "name": example.source}
    # A prompt shows different seeds, so there must be as many.
    needed = max(spec.examples, spec.answer_examples)
    if len(found) < needed:
        raise DataError(
            f"{context.name}: {len(found)} different seed instructions, but each prompt shows "
            f"{needed} (dropped: {ledger.counts() or 'none'}). Add seeds or lower 'examples'"
        )
    return Grown(list(found.values()), ledger=ledger)


def checks(grown: Grown, sampler: "Sampler", model_dir: Path) -> list[Check]:
    """Return the checks before the first round: seeds, prompts, and sampled continuations."""
    spec, chat = sampler.spec, sampler.chat
    dice = random.Random(derive_seed(sampler.seed, "self_instruct", 0))
    lists = [_list_prompt(_draw_examples(grown, spec, dice), spec) for _ in range(NUM_PROBES)]
    tasks = spread(grown.seeds, NUM_PROBES)
    prompts = [*lists, *(_answer_prompt(task, grown, spec=spec, dice=dice) for task in tasks)]
    rows = [PromptRow(tuple(chat.prompt_ids(p)), p, {}) for p in prompts]

    def seeds() -> Finding:
        # The worst case that a draw of the examples can meet.
        longest = sorted(grown.seeds, key=lambda task: -len(task["instruction"]))
        worst = len(chat.prompt_ids(_list_prompt(longest[: spec.examples], spec)))
        return Finding(
            f"{len(grown.seeds):,} different instructions; a list of the longest {spec.examples} "
            f"has {worst} tokens",
            f"at most {sampler.room}",
            "ok" if worst <= sampler.room else "warn",
            "lists that do not fit are skipped. Show fewer examples, remove long seeds or "
            "raise max_length",
        )

    def goes_on() -> Finding:
        fitting = [prompt for prompt in lists if sampler.fits(prompt)]
        said = [_first_item(c, spec) for c in sampler.ask(fitting, step=PROBE_STEP)]
        whole = sum(bool(text) and ended for text, ended in said)
        return Finding(
            f"{whole} of {len(lists)} lists are continued by a whole task ({sampler.engine.name})",
            "more than 0",
            "ok" if whole else "warn",
            "no list fits, or the model completes no item. Check 'wording', raise "
            "max_new_tokens or show fewer examples",
        )

    shown = prompt_checks(chat, rows, model_dir=model_dir)
    return [("seeds", seeds), *shown, ("sampler", goes_on)]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Samples from the model; the result depends only on (seed, round, position)."""

    engine: RolloutEngine
    chat: ChatFormat
    spec: SelfInstructStage
    seed: int

    @property
    def room(self) -> int:
        """Maximum number of tokens of a prompt."""
        return self.spec.max_length - self.spec.sampling.max_new_tokens

    def fits(self, prompt: Text) -> bool:
        """Return whether a prompt leaves room for the response."""
        return len(self.chat.prompt_ids(prompt)) <= self.room

    def ask(self, prompts: Sequence[Any], *, step: int) -> list[Completion]:
        """Sample one response to each prompt, which is plain text to continue or a conversation."""
        if not prompts:
            return []
        rows = [PromptRow(tuple(self.chat.prompt_ids(p)), p, {}) for p in prompts]
        with self.engine.awake():
            groups = sample_groups(
                self.engine,
                rows,
                n=1,
                step=step,
                seed=self.seed,
                sampling=self.spec.sampling,
                stop_token_ids=self.chat.stop_token_ids,
            )
        return [group[0] for group in groups]


def _one_round(grown: Grown, sampler: Sampler, number: int) -> None:
    """Run one round: sample instructions, reject invalid ones, sample responses to the others."""
    spec, seed = sampler.spec, sampler.seed
    # Depends only on the round, so a resumed stage draws the same lists.
    dice = random.Random(derive_seed(seed, "self_instruct", number))
    drawn = {
        f"round {number}, {i}": _draw_examples(grown, spec, dice)
        for i in range(spec.prompts_per_round)
    }
    # Instructions use even steps of the seed, responses odd ones.
    asked = {name: _list_prompt(tasks, spec) for name, tasks in drawn.items()}
    asked = _with_room(asked, grown, sampler, reason="list too long")
    said = sampler.ask(list(asked.values()), step=2 * number)
    # Candidates: each is compared with all known tasks and with those of this round.
    fresh: list[dict[str, Any]] = []
    for name, completion in zip(asked, said, strict=True):
        text, whole = _first_item(completion, spec)
        # Candidates of the same round must differ from each other as well.
        known = [*grown.tasks, *fresh]
        reason, details = refusal(text, whole=whole, known=known, spec=spec)
        if reason is not None:
            grown.ledger.add(name, reason, text=text, **details)
            continue
        examples = [task["name"] for task in drawn[name]]
        fresh.append({"instruction": text, "name": name, "examples": examples, **details})
    _answer_all(grown, sampler, fresh, dice=dice, number=number)


def _with_room(
    asked: dict[str, Any], grown: Grown, sampler: Sampler, *, reason: str
) -> dict[str, Any]:
    """Return the candidates whose prompt leaves room for a response; record the others."""
    kept = {name: prompt for name, prompt in asked.items() if sampler.fits(prompt)}
    for name in [name for name in asked if name not in kept]:
        grown.ledger.add(name, reason)
    return kept


def _draw_examples(grown: Grown, spec: SelfInstructStage, dice: random.Random) -> list[dict]:
    """Draw the tasks of one list: mostly seeds, a few generated ones, shuffled."""
    own = dice.sample(grown.rows, min(spec.grown_examples, len(grown.rows)))
    tasks = [*dice.sample(grown.seeds, spec.examples - len(own)), *own]
    dice.shuffle(tasks)
    return tasks


def _answer_all(
    grown: Grown,
    sampler: Sampler,
    fresh: Sequence[dict[str, Any]],
    *,
    dice: random.Random,
    number: int,
) -> None:
    """Sample responses to new instructions; those without a valid response are dropped."""
    tasks = {task["name"]: task for task in fresh}
    asked = {
        name: _answer_prompt(t, grown, spec=sampler.spec, dice=dice) for name, t in tasks.items()
    }
    asked = _with_room(asked, grown, sampler, reason="no room for an answer")
    # Even steps sample tasks, odd ones responses: no two draw the same seeds.
    said = sampler.ask(list(asked.values()), step=2 * number + 1)
    for name, completion in zip(asked, said, strict=True):
        task = tasks[name]
        text, whole = finished(completion, sampler.spec)
        if not whole:
            grown.ledger.add(task["name"], "answer cut", text=task["instruction"])
        elif not text:
            grown.ledger.add(task["name"], "answer empty", text=task["instruction"])
        elif text == task["instruction"]:
            grown.ledger.add(task["name"], "answer repeats the task", text=text)
        else:
            grown.rows.append({**task, "answer": text, "round": number})


def _answer_prompt(
    task: dict[str, Any], grown: Grown, *, spec: SelfInstructStage, dice: random.Random
) -> Any:
    """Return the prompt for a response: a conversation, or plain text after solved seeds."""
    if spec.answer == "chat":
        return [Turn(role="user", content=task["instruction"])]
    solved = spec.wording.solved
    shown = "".join(
        solved.replace("{instruction}", t["instruction"]).replace("{answer}", t["answer"])
        for t in dice.sample(grown.seeds, spec.answer_examples)
    )
    opening = solved.partition("{answer}")[0].replace("{instruction}", task["instruction"])
    return (shown + opening).rstrip(" ")


def to_row(row: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """Return a generated task as an SFT row with its provenance."""
    known = ("round", "name", "examples", "rouge_l", "nearest")
    return {
        "prompt": [Turn(role="user", content=row["instruction"])],
        "completion": [Turn(role="assistant", content=row["answer"])],
        "provenance": {**origin, **{key: row[key] for key in known}},
    }


def _log_round(metrics: MetricsLog, grown: Grown, number: int) -> None:
    """Log the progress of the stage and the newest task."""
    found = {"rows/kept": float(len(grown.rows)), "round": float(number + 1)}
    found |= {f"left/{reason}": float(n) for reason, n in grown.ledger.counts().items()}
    last = grown.rows[-1] if grown.rows else {"instruction": "", "answer": ""}
    sample = {"prompt": last["instruction"], "completion": last["answer"], "score": None}
    metrics.log(len(grown.rows), {k: v for k, v in found.items() if "/" in k}, sample=sample)


def save(grown: Grown, rounds: int, context: StageContext) -> None:
    """Save a checkpoint, so that an interrupted stage resumes after this round."""
    state = {"rows": grown.rows, "ledger": grown.ledger.entries}
    save_checkpoint(context.out / "checkpoints", rounds, engines={}, state=state, keep=1)


def restore(grown: Grown, context: StageContext) -> int:
    """Restore the newest checkpoint and return the number of rounds done."""
    found = newest_checkpoint(context.out / "checkpoints")
    if found is None:
        return 0
    rounds, state = load_checkpoint(found, {})
    grown.rows, grown.ledger.entries = state["rows"], state["ledger"]
    log.info("resumed from %s: %d rows", found, len(grown.rows))
    return rounds
