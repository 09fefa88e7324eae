"""Stage merge by mergekit: every alpha is answered by the engine, and the chosen one is written."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
sys.path.insert(0, str(Path(__file__).parent))
import alone
from tuned_stages import make_base, run_plain, run_stage


def test_a_sweep_by_ties_writes_a_policy_that_the_next_stage_takes(tmp_path) -> None:
    with alone.world_of_one():
        folder = make_base(tmp_path)
        run_stage(folder, "sft", {"method": "full"}, name="new")
        prompts = [{"world": "prompts", "rows": 4}]
        plain = {
            "kind": "merge",
            "base": "base",
            "tuned": str(folder / "new"),
            "method": "ties",
            "density": 0.5,
            "alphas": [0.5, 1.0],
            "prompts": prompts,
            "shifted": prompts,
            "scores": [{"kind": "length", "target": 2, "limit": 12}],
            "max_length": 128,
            "sampling": {"engine": "hf", "max_new_tokens": 4, "temperature": 0.0},
        }
        found = run_plain(folder, plain, name="merged")
        assert found.manifest["metrics"]["merge/alpha"] in (0.5, 1.0)
        assert not list(found.path.glob("tmp*"))
        more = {"init": str(folder / "merged")}
        assert run_stage(folder, "sft", {"method": "full"}, name="more", **more).model_dir.is_dir()
