"""Stages weak_label and curate in this process: votes, abstentions, and what leaves, by hand."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="the judge's client is the package openai")

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import alone
from judge_server import Server, running
from tuned_stages import make_base, run_plain, run_stage, write_rows

from align.core.types import Example
from align.stages.base import chat_format
from align.training.batch import trim_after_last_trained
from reward_models.scalar import RewardModel, score_token_ids

ANSWERS = ["yes indeed.", "no", "yes", "no way, not at all.", "maybe so"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a run with a base, in a world of one."""
    with alone.world_of_one():
        yield make_base(tmp_path_factory.mktemp("labeling"))


@pytest.fixture
def judge() -> Iterator[Server]:
    """Give 9 of 10 to whatever says yes, 2 to what says no, and no verdict on the rest."""

    def reply(request: dict) -> tuple[int, dict]:
        answer = request["messages"][-1]["content"].partition("<answer>\n")[2]
        grade = 9 if "yes" in answer else 2 if "no" in answer else None
        return 200, {"content": json.dumps({"score": grade}) if grade else "I cannot say"}

    with running() as server:
        server.reply = reply
        yield server


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_judge(server: Server) -> dict:
    endpoint = {"url": server.endpoint().url, "model": "m", "cache": None, "retries": 0}
    return {"kind": "judge", "endpoint": endpoint}


def test_a_judge_a_model_and_a_rule_vote_or_abstain(folder: Path, judge: Server) -> None:
    scorer = run_stage(folder, "reward", {"method": "full"}, name="reward")
    rows = [{"prompt": "Is it?", "completion": answer} for answer in ANSWERS]
    path = write_rows(folder / "answers.jsonl", rows)
    functions = [
        {"by": by_judge(judge), "good_from": 0.8, "bad_below": 0.2},
        {
            "by": {"kind": "scalar", "model": str(folder / "reward")},
            "good_from": 0.0,
            "bad_below": 0.0,
        },
        {"by": {"kind": "regex", "name": "ended", "pattern": "[.]$"}, "good_from": 1.0},
    ]
    plain = {"kind": "weak_label", "of": "sft", "data": [{"path": str(path)}]}
    found = run_plain(folder, plain | {"functions": functions}, name="labels")
    made = lines(found.path / "data.jsonl")
    assert [row["completion"] for row in made] == [row["completion"] for row in rows]
    votes = {name: [row["votes"][name] for row in made] for name in made[0]["votes"]}
    # 9 of 1 .. 10 is 8 / 9 and 2 is 1 / 9; what the judge will not grade is no vote.
    assert votes["judge"] == [1, 0, 1, 0, None]
    assert votes["ended"] == [1, None, None, 1, None]
    chat = chat_format(scorer.model_dir)
    ids = [
        trim_after_last_trained(chat.sft_row(Example(prompt="Is it?", completion=answer))).input_ids
        for answer in ANSWERS
    ]
    scores = score_token_ids(RewardModel.load(scorer.model_dir), ids)
    mean = json.loads((scorer.model_dir / "scorer.json").read_text())["mean"]
    # A scalar reward is (score - mean) / std: at least 0 from the mean on.
    assert votes["scalar"] == [int(score >= mean) for score in scores]
    assert len(set(votes["scalar"])) == 2
    assert all(0.0 < row["label_prob"] < 1.0 for row in made)
    coverage = {name: found.manifest["metrics"][f"{name}/coverage"] for name in votes}
    assert coverage == {"judge": 0.8, "scalar": 1.0, "ended": pytest.approx(0.4)}


def test_pairs_that_share_one_answer_are_no_duplicates_and_every_row_is_accounted_for(
    folder: Path,
) -> None:
    long = "one two three four five six seven eight nine ten"
    other = "it differs in every word from what was said before here"
    pairs = [(long, "bad"), (long, other), (long.upper() + "!", "Bad."), (other, long)]
    rows = [{"prompt": "Q?", "chosen": a, "rejected": b} for a, b in pairs]
    path = write_rows(folder / "pairs.jsonl", rows)
    plain = {"kind": "curate", "of": "preference", "data": [{"path": str(path)}]}
    found = run_plain(folder, plain | {"near_duplicates": 0.8}, name="curated")
    assert [row["from"] for row in lines(found.path / "data.jsonl")] == [
        f"{path}:{i}" for i in (1, 2, 4)
    ]
    (left,) = lines(found.path / "ledger.jsonl")
    assert left == {
        "source": f"{path}:3",
        "reason": "near-duplicate",
        "of": f"{path}:1",
        "similarity": 1.0,
    }
