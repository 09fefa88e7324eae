"""What the report says of answers, over-optimization, made data and a second run."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import test_report as parts

from align.recipe.schema import Recipe
from align.report import build_comparison, build_report
from align.report.answers import _marked

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MAX_BYTES = 3_000_000
CHROMIUMS_OWN = (".google.com", ".googleapis.com", ".gstatic.com", ".gvt1.com")
"""Where Chromium asks for the time and for updates of its own, whatever page is open."""


def evaluations(steps: int = 6) -> list[dict]:
    """Evaluations whose training score climbs while the gold score turns at d = 1."""
    rows = []
    for k in range(steps + 1):
        d = 0.4 * k
        gold = 0.5 + d * (0.4 - 0.4 * math.log(d)) if d else 0.5
        alarm = {"name": "gold_slope", "reason": "gold falls", "remedy": "stop <now>"}
        rows.append(
            {
                "step": 5 * k,
                "kl": d * d,
                "best_step": 10,
                "intervals": {
                    "proxy": [d, d - 0.1, d + 0.1],
                    "gold": [gold, gold - 0.05, gold + 0.05],
                    "length": [10.0 + k, 9.0, 12.0],
                },
                "fit": {"gold": {"alpha": [0.4, 0.3, 0.5], "beta": [0.4, 0.3, 0.5], "top_kl": 1.0}},
                "alarms": [alarm] if k == steps else [],
            }
        )
    return rows


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run with evaluations while training and a ledger."""
    spec = json.loads(json.dumps(parts.RECIPE))
    spec["stages"]["ppo"]["expect"] = {"kl/reference": [0.0, 0.05]}
    recipe = Recipe.model_validate(spec)
    folder = tmp_path / "demo"
    for name in recipe.stages:
        parts.write_stage(folder, recipe, name)
    parts.write_lines(folder / "ppo" / "evaluations.jsonl", evaluations())
    parts.write_lines(
        folder / "sft" / "ledger.jsonl",
        [
            {
                "source": f"a.jsonl:{i}",
                "reason": "too <short>" if i % 3 else "near-duplicate",
                "words": i,
            }
            for i in range(9)
        ],
    )
    (folder / "summary.json").write_text(json.dumps(parts.summary()))
    return folder


def test_words_that_the_baseline_does_not_say_are_marked_and_nothing_else():
    marked = _marked("sure, the answer is five.", "the answer is six.")
    assert re.findall(r"<mark>(.*?)</mark>", marked) == ["sure, ", "five."]
    assert re.sub(r"</?mark>", "", marked) == "sure, the answer is five."
    assert "<mark>" not in _marked("the same", "the same")
    assert _marked("<b>", "a") == "<mark>&lt;b&gt;</mark>"


def test_over_optimization_is_drawn_with_its_fit_and_alarms(run):
    html = build_report(run).read_text()
    section = html.partition("<h2>Over-optimization</h2>")[2].partition("</section>")[0]
    for text in (
        "training score",
        "gold score",
        "d = sqrt(KL)",
        "best gold score at step 10",
        "gold falls",
        "stop &lt;now&gt;",
    ):
        assert text in section
    # One dashed fit, of the gold score alone: the training score has none.
    assert section.count('class="line2 dashed"') == 1


def test_alarms_are_one_table_of_all_stages(run):
    assert "<h2>Alarms" not in build_report(run).read_text()
    alarm = {"step": 5, "name": "dead_groups", "reason": "a < b", "remedy": "use others"}
    parts.write_lines(run / "ppo" / "alarms.jsonl", [alarm])
    html = build_report(run).read_text()
    section = html.partition("<h2>Alarms: 1</h2>")[2].partition("</section>")[0]
    for text in ("ppo", "dead_groups", "a &lt; b", "use others"):
        assert text in section


OFFLINE = ["optim/grad_norm", "optim/learning_rate"]
ONLINE = ["reward/mean", "policy/entropy", "policy/clip_frac"]
LENGTHS = ["length/mean", "length/truncated_frac"]
FIRST_CHARTS = {
    "sft": ["loss", *OFFLINE],
    "reward": ["loss", "accuracy", "margin", *OFFLINE],
    "dpo": ["loss", "accuracy", "margin", "chosen_logprob", *OFFLINE],
    "ppo": [ONLINE[0], "kl/reference_per_answer", *ONLINE[1:], *LENGTHS],
    "grpo": [ONLINE[0], *ONLINE[1:], *LENGTHS, "reward/dead_group_frac"],
}


@pytest.mark.parametrize("kind", FIRST_CHARTS)
def test_the_charts_that_people_watch_come_first(run, kind):
    wanted = FIRST_CHARTS[kind]
    shared = {"loss", "accuracy", "margin", "chosen_logprob"}
    names = [f"train/{name}" if name in shared else name for name in wanted]
    # Other metrics of such a stage, logged before them.
    others = ["advantage/rms", "time/step_s", "sampler/logprob_gap", "value/loss", "tokens/per_s"]
    names = [*others, "reward/std", *reversed(names)] if kind in ("ppo", "grpo") else names[::-1]
    rows = [
        {"step": step, "total_steps": 3, **{name: step / 7 + i for i, name in enumerate(names)}}
        for step in (1, 2, 3)
    ]
    parts.write_lines(run / kind / "metrics.jsonl", rows)
    page = build_report(run).read_text().partition("<h2>Curves</h2>")[2].partition("</section>")[0]
    stage = page.partition(f"<h3>{kind}<")[2].partition("<h3>")[0]
    first = re.findall(r'data-chart="[^/"]+/([^"]+)"', stage.partition("<details>")[0])
    assert first[: len(wanted)] == wanted
    # Reward's mean and standard deviation share a chart.
    assert "reward/std" not in first


def test_made_data_and_bands_are_shown(run):
    html = build_report(run).read_text()
    ledger = html.partition("<h2>Data ledger</h2>")[2].partition("</section>")[0]
    assert "9 dropped" in ledger
    assert re.search(r"too &lt;short&gt;</th><td>6<", ledger)
    assert html.count('class="band"') == 1


def test_a_second_run_is_compared_number_by_number(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    changed = parts.summary()
    changed["tasks"]["heldout"]["models"]["sft"]["exact_match"] = [0.692, 0.652, 0.732]
    (other / "summary.json").write_text(json.dumps(changed))
    for file in other.glob("*/recipe.yaml"):
        file.write_text(file.read_text().replace("steps: 90", "steps: 120"))
    html = build_comparison(run, other).read_text()
    row = html.partition("sft exact_match")[2].partition("</tr>")[0]
    # 0.692 - 0.592, and sqrt(0.031^2 + 0.04^2) = 0.0506 on both sides.
    assert re.findall(r"[\d.]+", row.rpartition("<td>")[2])[:3] == ["0.100", "0.049", "0.151"]
    assert "stages.sft.steps" in html
    assert "1 key differs" in html
    assert "<summary>All of them" not in html


def test_many_keys_that_differ_are_folded(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for file in other.glob("*/recipe.yaml"):
        recipe = yaml.safe_load(file.read_text())
        recipe["stages"] = {f"b_{name}": spec for name, spec in recipe["stages"].items()}
        for spec in recipe["stages"].values():
            spec.update({"init": f"b_{spec['init']}"} if "init" in spec else {})
        del recipe["stages"]["b_evaluate"]
        file.write_text(yaml.safe_dump(recipe))
    html = build_comparison(run, other).read_text()
    found = html.partition("keys differ</h2>")[2]
    assert found.startswith("<details><summary>All of them</summary><div")
    assert "stages.b_sft.steps" in found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the report in")
@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_shows_the_page_without_a_request_or_an_error(run, tmp_path, width):
    path = build_report(run)
    assert path.stat().st_size < MAX_BYTES
    picture, netlog = tmp_path / "shot.png", tmp_path / "net.json"
    assert CHROMIUM is not None
    common = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--window-size={width},1600",
        f"--log-net-log={netlog}",
        "--enable-logging=stderr",
    ]
    env = os.environ | {"HOME": str(tmp_path)}
    shot = subprocess.run(
        [*common, f"--screenshot={picture}", path.as_uri()],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Content Security Policy" not in shot.stderr
    assert "CONSOLE" not in shot.stderr
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 20_000
    log = netlog.read_text()
    assert "evil.example" not in log
    hosts = set(re.findall(r'"url":"https?://([^/:"]+)', log))
    assert {host for host in hosts if not host.endswith(CHROMIUMS_OWN)} == set()
    dumped = subprocess.run(
        [*common, "--dump-dom", path.as_uri()],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "Over-optimization" in dumped
    assert dumped.count("<script") == 3
