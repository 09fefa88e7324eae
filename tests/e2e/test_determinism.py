"""One seed on one machine: the same bytes twice, of every kind of stage, on one and two ranks."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs

WORKER = Path(__file__).parent / "workers" / "stages.py"
STAGES = ("sft", "reward", "dpo", "kto", "ppo", "grpo")
ZERO = {"sft": 2, "reward": 3, "dpo": 1, "kto": 0, "ppo": 2, "grpo": 3}
KTO = """\
  kto:
    kind: kto
    init: base
    data: [{path: judged.jsonl}]
    steps: 4
    batch_size: 8
    micro_tokens: 256
    optim: {learning_rate: 1.0e-3}
"""


def work(recipe: Path, run_dir: Path, stages: tuple[str, ...], *, ranks: int) -> None:
    """Run stages in one process a rank."""
    short = {"sft": 6, "ppo": 4}
    overrides = [f"stages.{s}.steps={n}" for s, n in short.items()]
    overrides += [f"stages.{s}.checkpoint_every=0" for s in short]
    if ranks > 1:
        overrides += [f"stages.{s}.ranks={ranks}" for s in STAGES]
        overrides += [f"stages.{s}.zero.stage={zero}" for s, zero in ZERO.items()]
    command = [str(WORKER), "--recipe", str(recipe), "--run-dir", str(run_dir)]
    command += ["--stages", *stages, *(word for o in overrides for word in ("--set", o))]
    # Each Python has a seed of its own for its hashes.
    runs.finish_ranks(command, ranks, start=runs.Fresh)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Path]]:
    """Run every stage twice on one rank and twice on two, from the same base."""
    folder = tmp_path_factory.mktemp("twice")
    recipe = runs.write_recipe(folder)
    recipe.write_text(
        recipe.read_text() + KTO.replace("judged.jsonl", str(folder / "judged.jsonl"))
    )
    rows = [
        {
            "prompt": f"say {i}",
            "completion": f"{'yes' if i % 2 else 'no'} {i}",
            "label": bool(i % 2),
        }
        for i in range(24)
    ]
    (folder / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for ranks in (1, 2):
        pair = (folder / f"{ranks}a", folder / f"{ranks}b")
        for run_dir in pair:
            if ranks == 1:
                work(recipe, run_dir, ("base", *STAGES), ranks=1)
            else:
                shutil.copytree(found[1][0] / "base", run_dir / "base")
                work(recipe, run_dir, STAGES, ranks=2)
        found[ranks] = pair
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_same_seed_twice_gives_the_same_bytes(
    twice: dict[int, tuple[Path, Path]], stage: str, ranks: int
) -> None:
    first, second = twice[ranks]
    assert runs.weights(first, stage) == runs.weights(second, stage)
    assert runs.weights(first, stage) != runs.weights(first, "base")
    assert runs.numbers(first, stage) == runs.numbers(second, stage)


@pytest.mark.slow
def test_base_twice_gives_the_same_bytes(twice: dict[int, tuple[Path, Path]]) -> None:
    first, second = twice[1]
    assert runs.weights(first, "base") == runs.weights(second, "base")
