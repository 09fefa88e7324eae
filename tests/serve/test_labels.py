"""Labels without a server: queue, leases, undo, quality and export, each with its own oracle."""

import itertools
import json
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import DataError
from align.data.load import load_examples
from align.recipe.schema import DataSpec
from align.serve.labels import MIGRATIONS, tasks
from align.serve.labels.export import export, export_rows
from align.serve.labels.items import Candidate, Side, add_items, from_samples, read_file
from align.serve.labels.quality import Rate, agreement, krippendorff_alpha, quality_of
from align.serve.labels.tables import Project, create_project, find_project
from align.serve.labels.tasks import Answer, Task, TaskGone, next_task, record_answer, skip, undo
from align.serve.store import Store


@pytest.fixture
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sqlite3.Connection]:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "runs" / ".serve")
    store.migrate("labels", MIGRATIONS)
    with store.write() as found:
        yield found


class Clock:
    """The time that the tasks see."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(tasks, "time", found)
    return found


def pairs(count: int, **more: Any) -> list[Candidate]:
    return [
        Candidate(f"q{i}", (f"good {i}", f"poor {i}"), ("m1", "m2"), f"f.jsonl:{i + 1}", **more)
        for i in range(count)
    ]


def project_of(db: sqlite3.Connection, count: int = 10, **settings: Any) -> Project:
    project = create_project(db, Project("p", **settings))
    add_items(db, project, pairs(count))
    return project


def choose(task: Task, better: str = "good") -> str:
    """Return the side of the response that begins with a word."""
    return "left" if str(task.responses[0]).startswith(better) else "right"


def label(db: sqlite3.Connection, project: Project, name: str, choice: str = "") -> Task | None:
    task = next_task(db, project, name)
    if task is not None:
        answer = Answer(choice or choose(task), seconds=2.0)
        record_answer(db, project, name, task=task.id, answer=answer)
    return task


def votes(db: sqlite3.Connection) -> list[tuple[str, str]]:
    query = (
        "SELECT i.prompt, a.name FROM label_tasks t JOIN label_items i ON i.id = t.item_id JOIN "
        "label_annotators a ON a.id = t.annotator_id WHERE t.state = 'done' ORDER BY t.id"
    )
    return [(json.loads(row[0]), row[1]) for row in db.execute(query)]


# ---- projects and items


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "../x"}, "expected a name"),
        ({"name": "x\n"}, "expected a name"),
        ({"wanted": 0}, "wanted: found 0"),
        ({"gold_rate": 0.6}, "gold rate"),
        ({"repeat_rate": -0.1}, "repeat rate"),
        ({"repeat_rate": float("nan")}, "repeat rate"),
        ({"reasons": ("a", "a")}, "reasons"),
        ({"reasons": tuple("abcdefghij")}, "reasons: expected up to 9"),
        ({"kind": "thumbs", "queue": "margin"}, "orders pairs"),
        ({"kind": "stars"}, "kind: expected one of pairwise, thumbs, steps"),
    ],
)
def test_a_project_with_invalid_settings_is_refused(
    db: sqlite3.Connection, settings: dict[str, Any], message: str
):
    with pytest.raises(DataError, match=message):
        create_project(db, Project(**{"name": "p", **settings}))


def test_a_project_is_created_once_and_found_by_name(db: sqlite3.Connection):
    made = create_project(db, Project("helpful", reasons=("wrong", "rude"), wanted=3))
    assert find_project(db, "helpful") == made
    assert made.id
    with pytest.raises(DataError, match="helpful: this project exists"):
        create_project(db, Project("helpful"))
    with pytest.raises(DataError, match=r"no project 'helpfull'.*did you mean 'helpful'"):
        find_project(db, "helpfull")


def test_the_same_pair_is_added_once_whatever_its_order(db: sqlite3.Connection):
    project = create_project(db, Project("p"))
    assert add_items(db, project, pairs(3)) == (3, 0)
    swapped = [Candidate("q0", ("poor 0", "good 0")), Candidate("q9", ("a", "b"))]
    assert add_items(db, project, swapped) == (1, 1)
    with pytest.raises(DataError, match="both responses are the same"):
        add_items(db, project, [Candidate("q", ("a", "a"))])


def test_files_of_every_kind_are_read(tmp_path: Path):
    def file(*rows: dict[str, Any]) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    neutral = file({"prompt": "q", "response_a": "x", "response_b": "y", "models": ["m", "n"]})
    (pair,) = read_file(neutral, "pairwise")
    assert (pair.prompt, pair.responses, pair.models) == ("q", ("x", "y"), ("m", "n"))
    with pytest.raises(DataError, match="do not say which one is better"):
        read_file(neutral, "pairwise", gold=True)
    known = file({"prompt": "q", "chosen": "x", "rejected": "y", "margin": 0.5})
    (pair,) = read_file(known, "pairwise", gold=True)
    assert (pair.responses, pair.gold, pair.margins) == (("x", "y"), "a", (0.5,))
    asked = file({"prompt": "q", "completion": "one\n\ntwo"})
    assert read_file(asked, "thumbs")[0].responses == ("one\n\ntwo",)
    assert read_file(asked, "steps")[0].responses == ("one", "two")
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (thumb,) = read_file(file({"messages": said}), "thumbs")
    assert (list(thumb.prompt), list(thumb.responses[0])) == (said[:1], said[1:])
    judged = file({"prompt": "q", "completion": "x", "label": False})
    assert read_file(judged, "thumbs", gold=True)[0].gold == "bad"
    steps = file({"prompt": "q", "steps": [{"text": "s", "label": True}]})
    (solved,) = read_file(steps, "steps", gold=True)
    assert (solved.responses, solved.gold) == (("s",), "[true]")
    for row, message in (
        ({"gold": "x"}, "gold: found 'x', expected one of a, b, tie, bad"),
        ({"models": "m"}, "models: expected a list"),
        ({"reward_margins": [1, "2"]}, "reward_margins: expected a list of"),
    ):
        bad = file({"prompt": "q", "chosen": "x", "rejected": "y", **row})
        with pytest.raises(DataError, match=message):
            read_file(bad, "pairwise")


def samples(folder: Path, *rows: tuple[str, str, str, float]) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"model": m, "prompt": p, "completion": c, "scores": {"r": s, "r2": -s}, "score": s}
        for m, p, c, s in rows
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("kind", "gold", "row", "expected"),
    [
        ("thumbs", False, {"response_a": "x", "response_b": "y"}, "without a label: prompt and"),
        ("thumbs", False, {"completion": "x", "label": True}, "without a label: prompt and"),
        ("thumbs", True, {"completion": "x"}, "thumbs with --gold are single responses with a"),
        ("steps", True, {"completion": "x"}, "responses whose steps have labels"),
        ("pairwise", False, {"completion": "x"}, "pairs: prompt, response_a and response_b"),
    ],
)
def test_rows_of_another_kind_are_refused_in_words_of_the_labels(
    tmp_path: Path, kind: Any, gold: bool, row: dict[str, Any], expected: str
):
    file = tmp_path / "items.jsonl"
    file.write_text((json.dumps({"prompt": "q", **row}) + "\n") * 2)
    with pytest.raises(DataError) as caught:
        read_file(str(file), kind, gold=gold)
    message = str(caught.value)
    assert message.startswith(f"{file}:1: found a row of another kind; items of kind {kind}")
    assert expected in message
    assert "stage" not in message


def test_pairs_are_made_of_the_samples_of_two_models(tmp_path: Path):
    one = samples(
        tmp_path / "run" / "evaluate",
        *(("sft", "q1", "s1", 0.25), ("sft", "q2", "s2", 1.0), ("sft", "q3", "same", 1.0)),
        *(("dpo", "q2", "d2", 0.5), ("dpo", "q1", "d1", 2.0), ("dpo", "q3", "same", 1.0)),
    )
    other = samples(tmp_path / "run" / "late", ("ppo", "q2", "p2", 0.0))
    made = from_samples([Side(one, "sft"), Side(one, "dpo")], "pairwise", by=["r", "r2"])
    found = [(c.prompt, c.responses, c.models, c.margins) for c in made]
    assert found == [
        ("q1", ("s1", "d1"), ("sft", "dpo"), (-1.75, 1.75)),
        ("q2", ("s2", "d2"), ("sft", "dpo"), (0.5, -0.5)),
    ]
    (across,) = from_samples([Side(one, "sft"), Side(other)], "pairwise")
    assert (across.responses, across.models) == (("s2", "p2"), ("sft", "run/late"))
    single = [c.responses for c in from_samples([Side(one, "sft")], "thumbs")]
    assert single == [("s1",), ("s2",), ("same",)]
    with pytest.raises(DataError, match="no score 'judge'; this sample has: r, r2, score"):
        from_samples([Side(one, "sft"), Side(one, "dpo")], "pairwise", by=["judge"])
    with pytest.raises(DataError, match="no samples of 'rlhf'; it has dpo, sft"):
        from_samples([Side(one, "rlhf"), Side(one, "dpo")], "pairwise")
    with pytest.raises(DataError, match="no two different responses"):
        from_samples([Side(one, "sft")], "pairwise")
    with pytest.raises(DataError, match=r"no samples.jsonl in it"):
        from_samples([Side(tmp_path)], "thumbs")


def test_two_samples_of_one_model_are_a_pair(tmp_path: Path):
    rows = [("m", "q", text, 0.0) for text in "abcde"]
    (folder := samples(tmp_path / "r" / "e", *rows))
    made = from_samples([Side(folder, "m")], "pairwise")
    assert [c.responses for c in made] == [("a", "b"), ("c", "d")]


# ---- queue


def shown_prompts(db: sqlite3.Connection, project: Project, name: str = "ann") -> list[str]:
    found = []
    while (task := label(db, project, name)) is not None:
        found.append(str(task.prompt))
    return found


def test_every_item_is_shown_once_in_a_random_order_of_the_seed(db: sqlite3.Connection):
    project = project_of(db, 30)
    shown = shown_prompts(db, project)
    assert sorted(shown) == sorted(f"q{i}" for i in range(30))
    assert shown != [f"q{i}" for i in range(30)]
    other = create_project(db, Project("other", seed=1))
    add_items(db, other, pairs(30))
    assert shown_prompts(db, other) != shown


def test_the_smallest_margin_comes_first(db: sqlite3.Connection):
    project = create_project(db, Project("p", queue="margin"))
    margins = {"q0": 3.0, "q1": -0.5, "q2": 0.1, "q3": -2.0}
    add_items(db, project, [Candidate(q, ("a", "b"), margins=(m,)) for q, m in margins.items()])
    assert shown_prompts(db, project) == ["q2", "q1", "q3", "q0"]
    with pytest.raises(DataError, match="queue of p is margin, which needs the margins"):
        add_items(db, project, [Candidate("q9", ("a", "b"), source="x:1")])


def test_the_largest_disagreement_comes_first(db: sqlite3.Connection):
    project = create_project(db, Project("p", queue="ensemble"))
    # Population standard deviations by hand: 0, 1, 3, and 2.
    margins = {"q0": (5.0, 5.0), "q1": (1.0, 3.0), "q2": (-3.0, 3.0), "q3": (0.0, 4.0)}
    add_items(db, project, [Candidate(q, ("a", "b"), margins=m) for q, m in margins.items()])
    assert shown_prompts(db, project) == ["q2", "q3", "q1", "q0"]
    with pytest.raises(DataError, match="two or more reward models; found 1"):
        add_items(db, project, [Candidate("q9", ("a", "b"), margins=(1.0,))])


def test_sides_are_drawn_for_each_annotator_and_item(db: sqlite3.Connection):
    project = project_of(db, 300, wanted=2)
    left = {}
    for name in ("ann", "bob"):
        while (task := next_task(db, project, name)) is not None:
            left[name, task.prompt] = str(task.responses[0]).startswith("good")
            record_answer(db, project, name, task=task.id, answer=Answer("tie"))
    for name in ("ann", "bob"):
        count = sum(left[name, f"q{i}"] for i in range(300))
        # Four standard deviations of a fair coin: 150 +- 4 * sqrt(75).
        assert 115 < count < 185
    differ = sum(left["ann", f"q{i}"] != left["bob", f"q{i}"] for i in range(300))
    assert 115 < differ < 185


def test_the_task_is_the_same_until_it_is_answered(db: sqlite3.Connection):
    project = project_of(db)
    first = next_task(db, project, "ann")
    assert first is not None
    assert next_task(db, project, "ann") == first
    second = next_task(db, project, "ann", beside=[first.id])
    assert second is not None
    assert second.id != first.id
    ahead = {first.id, second.id}
    while (task := next_task(db, project, "ann", beside=ahead)) is not None:
        ahead.add(task.id)
    assert len(ahead) == tasks.MAX_AHEAD, "nobody can lease the whole queue"


def test_an_item_gets_its_labels_from_different_annotators(db: sqlite3.Connection):
    project = project_of(db, 5, wanted=2)
    names = ["ann", "bob", "eve"]
    for name in itertools.islice(itertools.cycle(names), 30):
        label(db, project, name)
    found = votes(db)
    assert len(found) == 10
    assert len(set(found)) == 10
    for i in range(5):
        assert len({name for prompt, name in found if prompt == f"q{i}"}) == 2


def test_a_lease_keeps_an_item_until_it_ends(db: sqlite3.Connection, clock: Clock):
    project = project_of(db, 1, lease_s=60.0)
    task = next_task(db, project, "ann")
    assert task is not None
    assert next_task(db, project, "bob") is None
    clock.now += 61
    assert label(db, project, "bob") is not None
    with pytest.raises(TaskGone, match="others have labeled it"):
        record_answer(db, project, "ann", task=task.id, answer=Answer("tie"))
    assert votes(db) == [("q0", "bob")]


def test_a_late_answer_counts_if_the_item_still_needs_it(db: sqlite3.Connection, clock: Clock):
    project = project_of(db, 1, lease_s=60.0)
    task = next_task(db, project, "ann")
    assert task is not None
    clock.now += 3600
    record_answer(db, project, "ann", task=task.id, answer=Answer("tie"))
    assert votes(db) == [("q0", "ann")]
    assert next_task(db, project, "bob") is None


def test_asking_again_renews_the_lease(db: sqlite3.Connection, clock: Clock):
    project = project_of(db, 1, lease_s=60.0)
    next_task(db, project, "ann")
    clock.now += 50
    assert next_task(db, project, "ann") is not None
    clock.now += 50
    assert next_task(db, project, "bob") is None


def test_many_annotators_in_any_order_lose_and_double_nothing(db: sqlite3.Connection, clock: Clock):
    project = project_of(db, 12, wanted=2, lease_s=60.0)
    dice = random.Random(5)
    held: dict[str, list[Task]] = {name: [] for name in ("ann", "bob", "eve", "joe")}
    for _ in range(3000):
        name = dice.choice(list(held))
        clock.now += dice.choice([1, 1, 1, 40])
        act = dice.random()
        mine = held[name]
        try:
            if act < 0.4:
                task = next_task(db, project, name, beside=[t.id for t in mine])
                if task is not None and task not in mine:
                    mine.append(task)
            elif act < 0.9 and mine:
                task = mine.pop(dice.randrange(len(mine)))
                record_answer(db, project, name, task=task.id, answer=Answer(choose(task)))
            elif act < 0.95:
                task = undo(db, project, name)
                if task is not None:
                    mine.append(task)
        except TaskGone:
            pass
    for name in ("late", "later"):  # whoever comes last finds the rest, and no more
        clock.now += 1000
        while label(db, project, name) is not None:
            pass
    found = votes(db)
    assert len(found) == len(set(found)) == 24
    assert all(sum(prompt == f"q{i}" for prompt, _ in found) == 2 for i in range(12))


# ---- answers


def test_the_same_answer_sent_twice_counts_once(db: sqlite3.Connection):
    project = project_of(db, 2)
    task = next_task(db, project, "ann")
    assert task is not None
    for _ in range(2):
        record_answer(db, project, "ann", task=task.id, answer=Answer("left", seconds=1.0))
    assert len(votes(db)) == 1
    with pytest.raises(DataError, match="done already; undo that first"):
        record_answer(db, project, "ann", task=task.id, answer=Answer("right"))
    with pytest.raises(DataError, match="labeled already; undo"):
        skip(db, project, "ann", task=task.id)


def test_a_task_belongs_to_one_annotator_of_one_project(db: sqlite3.Connection):
    project = project_of(db, 2)
    other = create_project(db, Project("other"))
    task = next_task(db, project, "ann")
    assert task is not None
    for who, where in (("bob", project), ("ann", other)):
        with pytest.raises(TaskGone):
            record_answer(db, where, who, task=task.id, answer=Answer("left"))


def test_undo_takes_back_answers_and_skips_from_the_last_on(db: sqlite3.Connection):
    project = project_of(db, 4)
    first = label(db, project, "ann")
    second = next_task(db, project, "ann")
    assert first is not None
    assert second is not None
    skip(db, project, "ann", task=second.id)
    third = label(db, project, "ann", "tie")
    assert third is not None
    assert undo(db, project, "ann") == third
    assert undo(db, project, "ann") == second
    assert undo(db, project, "ann") == first
    assert undo(db, project, "ann") is None
    assert votes(db) == []
    # The first again, in the same order on the screen, and then the others.
    assert next_task(db, project, "ann") == first
    assert undo(db, project, "bob") is None, "nobody takes back what others said"


def test_a_skipped_item_goes_to_others(db: sqlite3.Connection):
    project = project_of(db, 1)
    task = next_task(db, project, "ann")
    assert task is not None
    skip(db, project, "ann", task=task.id)
    assert next_task(db, project, "ann") is None
    assert label(db, project, "bob") is not None
    with pytest.raises(TaskGone, match="Others have labeled"):
        undo(db, project, "ann")


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        ("pairwise", Answer("good"), "expected one of left, right, tie, bad"),
        ("pairwise", Answer("tie", edit="x"), "choose the better response before"),
        ("pairwise", Answer("left", edit=" "), "empty, unchanged"),
        ("pairwise", Answer("left", edit="same"), "empty, unchanged"),
        ("pairwise", Answer("left", reasons=("rude",)), r"unknown reasons \['rude'\]"),
        ("pairwise", Answer("left", seconds=float("nan")), "seconds"),
        ("pairwise", Answer("left", steps=(True,)), "steps of a response without"),
        ("thumbs", Answer("left"), "expected one of good, bad"),
        ("thumbs", Answer("good", edit="x"), "choose the better response"),
        ("steps", Answer("steps", steps=(True,)), "1 labels for 2 steps"),
        ("steps", Answer("steps"), "0 labels for 2 steps"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(
    db: sqlite3.Connection, kind: Any, answer: Answer, message: str
):
    project = create_project(db, Project("p", kind=kind))
    responses = {"pairwise": ("same", "same "), "thumbs": ("a",), "steps": ("a", "b")}[kind]
    add_items(db, project, [Candidate("q", responses)])
    task = next_task(db, project, "ann")
    assert task is not None
    if answer.edit == "same" and task.responses[0] != "same":
        answer = Answer("right", edit="same")
    with pytest.raises(DataError, match=message):
        record_answer(db, project, "ann", task=task.id, answer=answer)
    assert votes(db) == []


# ---- gold and repeated items


def test_gold_and_repeated_items_come_at_the_stated_rates(db: sqlite3.Connection):
    project = create_project(db, Project("p", gold_rate=0.2, repeat_rate=0.1))
    add_items(db, project, pairs(700))
    gold = [Candidate(f"g{i}", ("good", "poor"), gold="a") for i in range(400)]
    add_items(db, project, gold)
    while label(db, project, "ann") is not None:
        pass
    rows = db.execute("SELECT purpose, count(*) FROM label_tasks GROUP BY purpose")
    counts = dict(map(tuple, rows.fetchall()))
    assert counts["label"] == 700
    # Of all shown 20 % and 10 %: 200 and 100 of 1000, within four standard deviations.
    assert 150 < counts["gold"] < 250
    assert 62 < counts["repeat"] < 138
    found = quality_of(db, project).annotators[0]
    assert found.gold == Rate(counts["gold"], counts["gold"])
    assert found.repeats == Rate(counts["repeat"], counts["repeat"])
    rows_, items = export_rows(db, project)
    assert len(rows_["preference.jsonl"]) == items["answered"] == 700


def test_a_repetition_comes_after_a_gap(db: sqlite3.Connection):
    project = project_of(db, 60, repeat_rate=0.5)
    while label(db, project, "ann") is not None:
        pass
    order = [prompt for prompt, _ in votes(db)]
    twice = {p for p in order if order.count(p) == 2}
    assert len(twice) > 10
    for prompt in twice:
        first, second = (i for i, p in enumerate(order) if p == prompt)
        assert second - first >= tasks.REPEAT_GAP
    assert max(order.count(p) for p in order) == 2


# ---- quality


def alpha_by_definition(units: list[list[Any]]) -> float | None:
    """1 - D_o / D_e over all pairs of pairable values (Krippendorff, 2011), counted one by one."""
    units = [u for u in units if len(u) > 1]
    values = [v for u in units for v in u]
    if not values:
        return None
    observed = sum(
        sum(a != b for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units
    ) / len(values)
    different = sum(a != b for a, b in itertools.permutations(values, 2))
    expected = different / (len(values) * (len(values) - 1))
    return 1.0 if expected == 0 else 1 - observed / expected


# Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, with the values printed there.
# B: two observers, binary, 10 units. C: two observers, nominal, 12 units. D: four observers with
# missing values, 12 units (the last one has a single value).
B = ([0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0])
C = (list("aabbdcccedda"), list("babbbccceddd"))
D = (
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
)


def units_of(observers: Any) -> list[list[Any]]:
    return [[v for v in unit if v is not None] for unit in zip(*observers, strict=True)]


@pytest.mark.parametrize(("observers", "printed"), [(B, 0.095), (C, 0.692), (D, 0.743)])
def test_alpha_is_that_of_the_literature(observers: Any, printed: float):
    assert krippendorff_alpha(units_of(observers)) == pytest.approx(printed, abs=5e-4)


def test_alpha_is_its_definition_on_random_labels_with_missing_ones():
    dice = random.Random(11)
    for _ in range(200):
        units = [
            [dice.choice("abt") for _ in range(dice.randrange(5))]
            for _ in range(dice.randrange(1, 8))
        ]
        expected = alpha_by_definition(units)
        found = krippendorff_alpha(units)
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_alpha_knows_its_limits():
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([["a"], []]) is None
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == 1.0
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) == 1.0
    # Two units, each split: of 4 values, D_o = 1 and D_e = 8 / 12, so alpha is -0.5.
    assert krippendorff_alpha([["a", "b"], ["a", "b"]]) == pytest.approx(-0.5)


def test_agreement_counts_pairs_of_labels():
    # 3 pairs of aab agree once, 1 pair of bb agrees, the single label has no pair.
    assert agreement([["a", "a", "b"], ["b", "b"], ["a"]]) == Rate(2, 4)


def test_wilson_interval_is_that_of_a_table():
    # Newcombe (1998), method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert Rate(hits, trials).interval() == pytest.approx((low, high), abs=5e-5)
    assert Rate(0, 0).value is None
    assert Rate(0, 0).interval() == (0.0, 1.0)


def test_quality_of_annotators_is_what_they_did(db: sqlite3.Connection):
    project = project_of(db, 40, wanted=2)
    for i in range(40):
        for name in ("fair", "lefty"):
            task = next_task(db, project, name)
            assert task is not None
            choice = choose(task) if name == "fair" else "left"
            answer = Answer(choice, seconds=float(i))
            record_answer(db, project, name, task=task.id, answer=answer)
    found = quality_of(db, project)
    fair, lefty = found.annotators
    assert (fair.pseudonym, fair.name, fair.labels) == ("annotator-1", "fair", 40)
    assert lefty.left == Rate(40, 40)
    assert lefty.left.interval()[0] > 0.9
    assert fair.left.interval()[0] < 0.5 < fair.left.interval()[1]
    assert fair.seconds == 19.5  # the median of 0 ... 39
    assert (found.items, found.labeled, found.labels) == (40, 40, 80)
    # lefty chose the good response where it was on the left.
    rows = db.execute(
        "SELECT flipped FROM label_tasks t JOIN label_annotators a ON a.id = t.annotator_id "
        "WHERE a.name = 'lefty'"
    )
    good = sum(not row["flipped"] for row in rows)
    assert found.agreement == Rate(good, 40)
    assert found.wins == {("m1", "m2"): Rate(40 + good, 80)}


# ---- export


def test_each_answer_becomes_the_rows_of_the_table(db: sqlite3.Connection, clock: Clock):
    project = create_project(db, Project("p", reasons=("wrong", "rude")))
    add_items(db, project, pairs(4))
    for name, answer in {
        "q0": lambda t: Answer(choose(t), reasons=("rude", "wrong"), seconds=3.14159),
        "q1": lambda t: Answer("tie"),
        "q2": lambda t: Answer("bad"),
        "q3": lambda t: Answer(choose(t), edit="best 3"),
    }.items():
        while (task := next_task(db, project, "ann", beside=[])) is not None:
            if task.prompt == name:
                record_answer(db, project, "ann", task=task.id, answer=answer(task))
                break
            skip(db, project, "ann", task=task.id)
        db.execute("DELETE FROM label_tasks WHERE state != 'done'")
    rows, counts = export_rows(db, project)
    assert counts == {"answered": 4, "contested": 0, "unfinished": 0}
    plain = {
        file: sorted(
            tuple(row.get(k) for k in ("prompt", "chosen", "rejected", "completion", "label"))
            for row in found
        )
        for file, found in rows.items()
    }
    assert plain == {
        "preference.jsonl": [
            ("q0", "good 0", "poor 0", None, None),
            ("q3", "best 3", "good 3", None, None),
            ("q3", "good 3", "poor 3", None, None),
        ],
        "ties.jsonl": [("q1", "good 1", "poor 1", None, None)],
        "unpaired.jsonl": [
            ("q0", None, None, "good 0", True),
            ("q0", None, None, "poor 0", False),
            ("q2", None, None, "good 2", False),
            ("q2", None, None, "poor 2", False),
            ("q3", None, None, "best 3", True),
            ("q3", None, None, "poor 3", False),
        ],
        "sft.jsonl": [("q3", None, None, "best 3", None)],
    }
    (row,) = [r for r in rows["preference.jsonl"] if r["prompt"] == "q0"]
    (vote,) = row["votes"]
    assert vote.pop("order") in ("ab", "ba")
    assert vote == {
        "annotator": "annotator-1",
        "answer": "a",
        "at": "2026-09-21T14:13:20+00:00",  # date -u -d @1790000000
        "seconds": 3.14,
        "reasons": ["wrong", "rude"],
    }
    assert row["models"] == {"chosen": "m1", "rejected": "m2"}
    assert row["from"] == "f.jsonl:1"
    assert "ann" not in {v["annotator"] for r in rows["preference.jsonl"] for v in r["votes"]}


def test_the_majority_decides_and_contested_items_are_left_out(db: sqlite3.Connection):
    project = project_of(db, 3, wanted=3)
    said = {"q0": ["good", "good", "poor"], "q1": ["good", "poor", "tie"], "q2": ["good"]}
    for i, name in enumerate(("ann", "bob", "eve")):
        while (task := next_task(db, project, name)) is not None:
            word = (said[str(task.prompt)][i:] or [""])[0]
            choice = "tie" if word == "tie" else choose(task, word)
            if word:
                record_answer(db, project, name, task=task.id, answer=Answer(choice))
            else:
                skip(db, project, name, task=task.id)
    rows, counts = export_rows(db, project)
    assert counts == {"answered": 1, "contested": 1, "unfinished": 1}
    (row,) = rows["preference.jsonl"]
    assert (row["chosen"], len(row["votes"])) == ("good 0", 3)
    assert [vote["answer"] for vote in row["votes"]] == ["a", "a", "b"]


def test_a_snapshot_is_the_same_bytes_until_a_label_changes(db: sqlite3.Connection):
    project = project_of(db, 3)
    with pytest.raises(DataError, match="nothing to export"):
        export(db, project)
    label(db, project, "ann")
    first = export(db, project)
    assert export(db, project) == first
    label(db, project, "ann")
    second = export(db, project)
    assert [p.name[:4] for p in (first, second)] == ["0001", "0002"]
    assert (first / "preference.jsonl").read_text().count("\n") == 1
    undo(db, project, "ann")
    again = export(db, project)
    assert again.name == first.name.replace("0001", "0003"), "an older state is a new number"


TURNS = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize("prompt", ["q", TURNS])
def test_a_stage_reads_what_was_exported(db: sqlite3.Connection, prompt: Any):
    project = create_project(db, Project("p"))
    add_items(db, project, [Candidate(prompt, ("good", "poor"))])
    task = next_task(db, project, "ann")
    assert task is not None
    answer = Answer(choose(task), edit="better")
    record_answer(db, project, "ann", task=task.id, answer=answer)
    export(db, project)

    def said(text: str) -> Any:
        return text if prompt == "q" else [{"role": "assistant", "content": text}]

    found = load_examples([DataSpec(labels="p")], kind="preference", seed=0)
    assert [(e.prompt, e.completion, e.rejected) for e in found] == [
        (prompt, said("good"), said("poor")),
        (prompt, said("better"), said("good")),
    ]
    liked = load_examples([DataSpec(labels="p")], kind="unpaired", seed=0)
    expected = [(said("better"), True), (said("poor"), False)]
    assert [(e.completion, e.label) for e in liked] == expected
    (shown,) = load_examples([DataSpec(labels="p")], kind="sft", seed=0)
    assert (shown.prompt, shown.completion) == (prompt, said("better"))


def test_thumbs_and_steps_are_exported(db: sqlite3.Connection):
    thumbs = create_project(db, Project("thumbs", kind="thumbs"))
    add_items(db, thumbs, [Candidate("q1", ("good",)), Candidate("q2", ("poor",))])
    while (task := next_task(db, thumbs, "ann")) is not None:
        choice = "good" if task.responses[0] == "good" else "bad"
        record_answer(db, thumbs, "ann", task=task.id, answer=Answer(choice))
    export(db, thumbs)
    found = load_examples([DataSpec(labels="thumbs")], kind="unpaired", seed=0)
    assert {(e.prompt, e.completion, e.label) for e in found} == {
        ("q1", "good", True),
        ("q2", "poor", False),
    }
    (sft,) = load_examples([DataSpec(labels="thumbs")], kind="sft", seed=0)
    assert (sft.prompt, sft.completion) == ("q1", "good")
    steps = create_project(db, Project("steps", kind="steps"))
    add_items(db, steps, [Candidate("q", ("one", "two", "three"))])
    task = next_task(db, steps, "ann")
    assert task is not None
    assert task.responses == ("one", "two", "three"), "steps keep their order"
    answer = Answer("steps", steps=(True, False, True))
    record_answer(db, steps, "ann", task=task.id, answer=answer)
    export(db, steps)
    (solved,) = load_examples([DataSpec(labels="steps")], kind="steps", seed=0)
    assert solved.columns["steps"] == ["one", "two", "three"]
    assert solved.columns["step_labels"] == [True, False, True]
