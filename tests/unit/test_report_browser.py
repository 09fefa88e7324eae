"""The report in a real browser: charts that answer to the pointer, and responses that are found."""

import csv
import io
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import test_report as parts

from align.report import build_comparison, build_report
from tests.browser import Watched, accessibility_findings, chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "demo"
    parts.write_run(run)
    parts.write_lines(run / "ppo" / "evaluations.jsonl", EVALUATIONS)
    rows = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"tokens/sampled": 100.0, "kl/coef": 0.125}
        if row["step"] in (10, 20):
            row["eval/gold"] = row["step"] / 20
    parts.write_lines(run / "ppo" / "metrics.jsonl", rows)
    return run


EVALUATIONS = [
    {
        "step": step,
        "kl": 0.0,
        "intervals": {name: [step / 20, step / 20 - 0.25, step / 20 + 0.125] for name in NAMES},
        "answers": [
            {"prompt": "Sort: 3 1 2", "completion": f"one two {step}", "gold": step / 20},
        ],
    }
    for NAMES in [("gold", "proxy", "length")]
    for step in (10, 20)
]


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    watched = Watched(page)
    page.goto(build_report(folder).as_uri())
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    yield page
    watched.assert_quiet("file:")
    page.close()


def figure(page: Any, name: str) -> Any:
    found = page.locator(f'figure[data-chart="{name}"]')
    found.scroll_into_view_if_needed()
    found.locator("svg.live .axes").wait_for()
    return found


def hover(page: Any, chart: Any, part: float) -> str:
    """Rest the pointer at a part of the width of the plot; return the text that appears."""
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    left, right = box["x"] + 58, box["x"] + box["width"] - 12
    page.mouse.move(left + part * (right - left), box["y"] + 60)
    return chart.locator(".tip").inner_text()


def row_of(folder: Path, stage: str, step: int) -> dict[str, Any]:
    lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
    return next(row for row in map(json.loads, lines) if row["step"] == step)


def test_the_pointer_shows_the_value_of_the_logged_step(page: Any, folder: Path) -> None:
    # 40 steps from 1 to 40: the place of step 14 is a third of the width.
    text = hover(page, figure(page, "ppo/kl/reference"), 13 / 39)
    value = row_of(folder, "ppo", 14)["kl/reference"]
    assert text.splitlines()[0] == "step 14"
    assert text.splitlines()[1].split()[-2:] == [f"{value:.5g}", "nats"]


def test_dragging_zooms_and_a_double_click_shows_all_again(page: Any) -> None:
    chart = figure(page, "grpo/kl/reference")
    labels = chart.locator(".axes text.middle")
    before = labels.all_text_contents()
    box = chart.locator("svg").bounding_box()
    left, width, y = box["x"] + 58, box["width"] - 70, box["y"] + 70
    page.mouse.move(left + 0.5 * width, y)
    page.mouse.down()
    page.mouse.move(left + 0.75 * width, y, steps=4)
    page.mouse.up()
    steps = [int(text) for text in labels.all_text_contents() if text.isdigit()]
    # 600 steps: half to three quarters are 300 to 450.
    assert min(steps) >= 295
    assert max(steps) <= 455
    chart.locator("svg").dblclick(position={"x": 100, "y": 60})
    assert labels.all_text_contents() == before


def test_the_keyboard_moves_from_step_to_step(page: Any) -> None:
    chart = figure(page, "ppo/kl/reference")
    chart.locator("svg").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert chart.locator(".tip").inner_text().startswith("step 3\n")
    page.keyboard.press("Escape")
    assert not chart.locator(".tip").is_visible()


def test_the_axis_can_be_time_or_tokens_and_the_scale_logarithmic(page: Any, folder: Path) -> None:
    chart = figure(page, "ppo/kl/reference")
    axis = page.locator("[data-chart-controls] select")
    axis.select_option("tokens")
    # 100 tokens a step.
    assert hover(page, chart, 13 / 39).startswith("tokens 1400")
    axis.select_option("time_s")
    assert hover(page, chart, 13 / 39).startswith(f"time {14 * 0.31:.1f} s")
    page.get_by_label("log scale").check()
    assert "nats, log" in chart.locator(".axes").text_content()
    # On a logarithmic scale equal factors are equal distances: steps 10, 20 and 40.
    points = chart.locator("polyline").get_attribute("points").split()
    y = [float(point.split(",")[1]) for point in points]
    assert y[9] - y[19] == pytest.approx(y[19] - y[39], abs=0.2)


def test_smoothing_is_the_debiased_exponential_mean(page: Any, folder: Path) -> None:
    chart = figure(page, "ppo/kl/reference")
    page.get_by_label("smoothing").fill("0.9")
    weights = [0.9 ** (14 - step) for step in range(1, 15)]
    values = [row_of(folder, "ppo", step)["kl/reference"] for step in range(1, 15)]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert f"smoothed {mean:.5g}" in hover(page, chart, 13 / 39)


def test_intervals_are_drawn_and_shown(page: Any) -> None:
    chart = figure(page, "ppo/gold")
    assert chart.locator("polygon.area").count() == 1
    assert "[0.75, 1.125] score" in hover(page, chart, 1.0)


def test_a_metric_that_never_changes_is_a_sentence(page: Any) -> None:
    assert page.locator('figure[data-chart="ppo/kl/coef"]').count() == 0
    (said,) = [p for p in page.locator("p").all_inner_texts() if "kl/coef" in p]
    assert said == (
        "The same at every step: time/rollout_s 0.4, tokens/sampled 100, kl/coef 0.125."
    )


def test_stages_are_drawn_in_one_chart_and_lines_can_be_hidden(page: Any) -> None:
    chart = page.locator("figure[data-overlay]")
    chart.locator("select").select_option("kl/reference")
    assert [b.split()[0] for b in chart.locator("button.line").all_inner_texts()] == ["ppo", "grpo"]
    assert chart.locator("polyline").count() == 2
    chart.locator("button.line").first.click()
    assert chart.locator("polyline").count() == 1


def test_csv_has_every_value_and_png_is_a_picture(page: Any, folder: Path) -> None:
    chart = figure(page, "ppo/reward/mean")
    with page.expect_download() as download:
        chart.get_by_role("button", name="CSV").click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    assert download.value.suggested_filename == "ppo-reward-mean.csv"
    logged = [row_of(folder, "ppo", step)["reward/mean"] for step in range(1, 41)]
    found = [float(row["value"]) if row["value"] else None for row in rows]
    assert [v is None for v in found] == [v is None for v in logged]
    assert all(
        a is None or math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found, logged, strict=True)
    )
    assert rows[13]["tokens"] == "1400"
    with page.expect_download() as download:
        chart.get_by_role("button", name="PNG").click()
    picture = Path(download.value.path()).read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 3000


def test_responses_are_searched_filtered_and_linked(page: Any) -> None:
    articles = page.locator("[data-samples] article")
    status = page.locator("[data-samples] [role=status]")
    assert status.inner_text() == "60 of 60 prompts"
    page.get_by_label("search prompts and responses").fill("gladly 37")
    assert status.inner_text() == "1 of 60 prompts"
    assert "What is 37 plus 37?" in articles.inner_text()
    # A hostile response is text, here too.
    assert parts.EVIL in articles.inner_text()
    link = articles.locator("a.permalink").get_attribute("href")
    page.get_by_label("search prompts and responses").fill("")
    page.evaluate("hash => { location.hash = hash }", link)
    page.locator(f"article{link}").wait_for()
    assert "What is 37 plus 37?" in page.locator(f"article{link}").inner_text()


def test_the_same_prompt_is_shown_at_several_steps(page: Any) -> None:
    text = page.locator("article", has_text="one two 10").inner_text()
    assert "step 10" in text
    assert "one two 20" in text


def test_filters_find_wrong_responses_and_disagreeing_judges(
    browser: Any, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "judged"
    shutil.copytree(folder, run)
    # (right by the rule, judge's score) of two models: only on prompt 2 do they disagree.
    table = [((1, 1.0), (1, 0.5)), ((0, 0.0), (1, 1.0)), ((1, 0.0), (0, 1.0))]
    rows = [
        {
            "model": model,
            "prompt": f"prompt {i}",
            "completion": "word " * (i + 1),
            "score": judge,
            "judge": judge,
            "scores": {"exact_match": right, "reward": 0.3},
            "length": i + 1,
        }
        for i, both in enumerate(table)
        for model, (right, judge) in zip(("sft", "dpo"), both, strict=True)
    ]
    parts.write_lines(run / "evaluate" / "samples.jsonl", rows)
    page = browser.new_page()
    watched = Watched(page)
    page.goto(build_report(run).as_uri())

    def shown() -> list[str]:
        return page.locator("[data-samples] article .prompt").all_inner_texts()

    assert shown() == ["prompt 0", "prompt 1", "prompt 2"]
    page.get_by_label("order").select_option("longest")
    assert shown() == ["prompt 2", "prompt 1", "prompt 0"]
    page.get_by_label("wrong (exact_match is 0)").check()
    assert shown() == ["prompt 2", "prompt 1"]
    page.get_by_label("model that the filters look at").select_option("dpo")
    assert shown() == ["prompt 2"]
    page.get_by_label("wrong (exact_match is 0)").uncheck()
    page.get_by_label("judge disagrees").check()
    assert shown() == ["prompt 2"]
    watched.assert_quiet("file:")
    page.close()


def test_runs_are_compared_in_one_chart(browser: Any, folder: Path, tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("second", "third")]
    for other in others:
        shutil.copytree(folder, other)
    page = browser.new_page()
    watched = Watched(page)
    page.goto(build_comparison(folder, *others).as_uri())
    legend = figure(page, "ppo/kl/reference").locator("button.line").all_inner_texts()
    assert [text.split()[0] for text in legend] == ["demo", "second", "third"]
    watched.assert_quiet("file:")
    page.close()


LAYOUT = """() => {
  const found = [], shown = (node) => node.checkVisibility({ visibilityProperty: true });
  for (const svg of document.querySelectorAll("svg")) {
    if (!shown(svg)) continue;
    const name = svg.getAttribute("aria-label"), frame = svg.getBoundingClientRect();
    const labels = [...svg.querySelectorAll("text")].filter(shown)
      .map((node) => [node.textContent, node.getBoundingClientRect()])
      .filter(([, box]) => box.width);
    labels.forEach(([text, a], i) => {
      if (a.left < frame.left - 2 || a.right > frame.right + 2)
        found.push(`${name}: ${text} is cut`);
      for (const [other, b] of labels.slice(i + 1)) {
        const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (width > 1 && height > 3) found.push(`${name}: ${text} overlaps ${other}`);
      }
    });
  }
  for (const node of document.querySelectorAll("h1, h2, h3, p, li, td, th, pre, nav, figcaption"))
    if (shown(node) && node.scrollWidth > node.clientWidth + 2 && node.clientWidth)
      found.push(`wider than its place: ${node.textContent.slice(0, 60)}`);
  if (document.documentElement.scrollWidth > innerWidth) found.push("the page scrolls sideways");
  return found;
}"""
"""Return the labels that overlap or are cut, and texts that are wider than their place.

It compares boxes with each other, not with a picture: fonts and Chromium versions may differ.
"""


SCROLLED_NAMES = """() => {
  const found = [];
  for (const box of document.querySelectorAll(".wide")) {
    box.scrollLeft = box.scrollWidth;
    const name = box.querySelector("tbody th");
    if (name && name.getBoundingClientRect().left < box.getBoundingClientRect().left - 1)
      found.push(name.textContent);
    box.scrollLeft = 0;
  }
  return found;
}"""
"""Return the names of rows that leave the screen when their table is scrolled to its end."""


@pytest.fixture(scope="module")
def crowded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that is hard to draw: long tick labels, dark shades, tokens on tinted ground."""
    run = tmp_path_factory.mktemp("runs") / "crowded"
    shutil.copytree(folder, run)
    rows = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["policy/weight_rms"] = 0.356 + row["step"] * 2e-6
    parts.write_lines(run / "ppo" / "metrics.jsonl", rows)
    tokens = [[f" word{i}", "masked" if i < 6 else "trained"] for i in range(12)]
    counts = {"masked": 6, "trained": 6, "stop": 0}
    view = {"source": "rows.jsonl:1", "side": "response", "counts": counts, "tokens": tokens}
    (run / "ppo" / "tokens.json").write_text(json.dumps([view]))
    summary = json.loads((run / "summary.json").read_text())
    block = dict(next(iter(summary["tasks"].values())))
    block["models"] = {
        name: values | {"exact_match": [i / 4, max(0, i / 4 - 0.1), min(1, i / 4 + 0.1)]}
        for i, (name, values) in enumerate(block["models"].items())
    }
    summary["tasks"] = {**summary["tasks"], "second": block, "third": block}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_layout_holds_at_three_widths(browser: Any, crowded: Path, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    page.goto(build_report(crowded).as_uri())
    for width in (390, 820, 1400):
        page.set_viewport_size({"width": width, "height": 800})
        # Folded, then unfolded, with the charts of the script drawn.
        assert page.evaluate(LAYOUT) == [], width
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        figure(page, "ppo/policy/weight_rms")
        assert page.evaluate(LAYOUT) == [], width
        assert accessibility_findings(page) == [], width
        assert page.evaluate(SCROLLED_NAMES) == [], width
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = false")
    page.close()


def test_without_javascript_there_are_pictures_and_no_dead_controls(
    browser: Any, folder: Path
) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(build_report(folder).as_uri())
    chart = page.locator('figure[data-chart="ppo/kl/reference"]')
    assert chart.locator("svg polyline").count() == 1
    assert not page.locator("button, select, input").count()
    assert not page.locator("figure[data-overlay]").is_visible()
    context.close()
