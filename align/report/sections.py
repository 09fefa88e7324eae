"""General sections of the report, each a pure function of the run's record."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from align.core.card import CARD_FILE, Card, read_card, title
from align.core.model_card import resharded_lines
from align.report.markup import Markup, duration, join, number, table, tag, triple
from align.report.read import Row, RunRecord, StageRecord, read_lines
from align.report.series import CHANGE

LEDGER_FILE = "ledger.jsonl"
NUM_SHOWN = 5
"""Largest number of example rows per reason."""
PROMPT_CUT = "prompt cut"
"""The only reason in the ledger whose rows are kept."""
CLASSES = {"ok": "ok", "fail": "bad"}
"""CSS classes of the verdicts of a preflight check."""


def missing(run: RunRecord) -> Markup | None:
    """Return a note on what an unfinished or damaged run lacks; None for a complete run."""
    lines = [_lack(stage) for stage in run.stages if stage.status != "done"]
    if not run.summary and any(stage.kind == "evaluate" for stage in run.stages):
        lines.append("No summary.json yet: the comparison needs a finished evaluate stage.")
    lines += run.problems
    if not lines:
        return None
    return tag("div", tag("b", "This run is not complete"), _list(lines), class_="note")


def _lack(stage: StageRecord) -> str:
    if stage.status == "changed":
        return f"{stage.name}: finished, but its configuration differs from the newest recipe."
    if stage.status == "not started":
        return f"{stage.name}: not started."
    if not stage.metrics:
        return f"{stage.name}: started, nothing logged yet."
    last = stage.metrics[-1]
    return f"{stage.name}: unfinished at step {last.get('step')} of {last.get('total_steps')}."


def _list(lines: Iterable[object]) -> Markup:
    return tag("ul", *(tag("li", line) for line in lines))


def reward_models(run: RunRecord) -> Markup | None:
    """Return the section with reward models' held-out accuracy; None if none was measured."""
    found: Mapping[str, Row] = run.summary.get("reward_models", {})
    if not found:
        return None
    names = list(dict.fromkeys(name for block in found.values() for name in block))
    rows: list[list[object]] = [
        [model, *(triple(block.get(n)) for n in names)] for model, block in found.items()
    ]
    heads: list[object] = ["reward model", *(f"held-out {n.replace('_', ' ')}" for n in names)]
    return tag("section", tag("h2", "Reward models"), table(heads, rows, class_="numbers"))


def expectations(run: RunRecord) -> Markup | None:
    """Return the section that checks each expected range of the recipe; None without any."""
    found = run.summary.get("expectations", [])
    if not found:
        return None
    rows: list[list[object]] = []
    for line in found:
        low, high = line["band"]
        band = f"{number(low) if low is not None else '…'} to " + (
            number(high) if high is not None else "…"
        )
        holds = line["holds"]
        verdict = tag("span", "✓ holds" if holds else "✗ fails", class_="ok" if holds else "bad")
        rows.append([line["key"], band, number(line["value"]), verdict, line.get("problem", "")])
    # The last column is for problems such as a missing number; it is dropped if empty.
    if not any(row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    held = sum(line["holds"] for line in found)
    heads: list[object] = ["number of summary.json", "band", "value", "verdict", ""]
    title, shown = f"Expectations: {held} of {len(found)} hold", table(heads[: len(rows[0])], rows)
    # The first screen names those that failed; a table that only confirms is folded.
    if held == len(found):
        return tag("section", tag("details", tag("summary", title), shown), id="expectations")
    return tag("section", tag("h2", title), shown, id="expectations")


def alarms(run: RunRecord) -> Markup | None:
    """Return the section with the alarms that stages raised while they ran; None without any."""
    keys = ("step", "name", "reason", "remedy")
    rows: list[list[object]] = [
        [stage.name, *(row.get(key) for key in keys)]
        for stage in run.stages
        for row in stage.alarms
    ]
    if not rows:
        return None
    heads: list[object] = ["stage", "step", "alarm", "observed", "what to do"]
    return tag("section", tag("h2", f"Alarms: {len(rows)}"), table(heads, rows), id="alarms")


def changes(run: RunRecord) -> Markup | None:
    """Return the table of held-out metrics before and after each stage; None without any."""
    rows: list[list[object]] = []
    for stage in run.stages:
        first = stage.metrics[0] if stage.metrics else {}
        for name, value in stage.manifest.get("metrics", {}).items():
            metric = name.removeprefix(CHANGE)
            if metric == name or metric.endswith(("_low", "_high")) or first.get("step") != 0:
                continue
            before = first.get(f"eval/{metric}")
            if not isinstance(before, int | float):
                continue
            low, high = (stage.manifest["metrics"].get(f"{name}_{end}") for end in ("low", "high"))
            spread = "-" if low is None else f"[{number(low)}, {number(high)}]"
            after = before + value
            rows.append([stage.name, metric, number(before), number(after), number(value), spread])
    if not rows:
        return None
    heads: list[object] = ["stage", "held-out metric", "step 0", "end", "change", "95 % interval"]
    told = (
        "Intervals are paired and clustered by prompt. They cover other prompts of the same kind."
    )
    return tag(
        "section",
        tag("h2", "Change on held-out rows"),
        tag("p", told),
        table(heads, rows, class_="numbers"),
    )


def cost(run: RunRecord) -> Markup:
    """Return the section with each stage's wall time, peak memory and speed."""
    known = run.summary.get("stages", {})
    rows: list[list[object]] = []
    for stage in run.stages:
        # The stage's own files come first; the summary fills in what they lack.
        summary = {**known.get(stage.name, {})}
        speeds = [row["tokens/per_s"] for row in stage.metrics if row.get("tokens/per_s")]
        speed = summary.get("tokens_per_s") or (sum(speeds) / len(speeds) if speeds else None)
        peak = stage.manifest.get("peak_rss_gib", summary.get("peak_rss_gib"))
        steps = stage.metrics[-1].get("step") if stage.metrics else None
        ranks = stage.manifest.get("ranks", run.recipe.stages[stage.name].ranks)
        seconds = duration(stage.seconds if stage.seconds is not None else summary.get("seconds"))
        rows.append(
            [stage.name, stage.kind, ranks, number(steps), seconds, number(peak), number(speed)]
        )
    total = run.summary.get("seconds") or sum(s.seconds or 0.0 for s in run.stages)
    rows.append(["all", "", "", "", duration(total), "", ""])
    heads: list[object] = [
        "stage",
        "kind",
        "ranks",
        "steps",
        "wall time",
        "peak memory, all ranks (GiB)",
        "tokens/s",
    ]
    notes = [
        tag("p", f"{stage.name}: {line}.")
        for stage in run.stages
        for line in resharded_lines(stage.manifest)
    ]
    return tag("section", tag("h2", "Cost"), table(heads, rows, class_="numbers"), *notes)


def reproduce(run: RunRecord) -> Markup:
    """Return the section needed to reproduce the run: command, seed, versions, data, recipe."""
    manifests = [stage.manifest for stage in run.stages if stage.manifest]
    versions: dict[str, str] = {}
    for manifest in manifests:
        versions.update(manifest.get("versions", {}))
    commits = list(dict.fromkeys(str(m["git_commit"]) for m in manifests if m.get("git_commit")))
    text = yaml.safe_dump(
        run.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=96
    )
    data = {
        d["path"]: [d["path"], number(d.get("rows")), tag("code", str(d.get("sha256"))[:16])]
        for manifest in manifests
        for d in manifest.get("data", [])
        if d.get("path")
    }
    facts: list[list[object]] = [
        ["command", tag("code", f"align run {run.recipe.name}.yaml")],
        ["seed", run.recipe.seed],
        ["engine", run.summary.get("engine", "-")],
        ["git commit", ", ".join(commits) or "-"],
        ["versions", ", ".join(f"{name} {v}" for name, v in sorted(versions.items())) or "-"],
    ]
    return tag(
        "section",
        tag("h2", "How to reproduce"),
        tag(
            "p",
            f"Save the recipe below as {run.recipe.name}.yaml and run the command. On CPU, the "
            "same seed and versions give bit-identical weights.",
        ),
        table(["", ""], facts, class_="facts"),
        _data_table(data) if data else None,
        tag(
            "details",
            tag("summary", "Recipe (keys that differ from their defaults)"),
            tag("pre", text),
        ),
        tag(
            "details",
            tag("summary", "summary.json"),
            tag("pre", json.dumps(run.summary, indent=1, ensure_ascii=False)),
        ),
    )


def _data_table(data: Mapping[str, list[object]]) -> Markup:
    rows = table(["path", "rows", "sha256"], list(data.values()))
    return tag("details", tag("summary", "Data"), rows)


def ledger(run: RunRecord) -> Markup | None:
    """Return the section with each stage's kept, dropped and truncated rows, by reason."""
    blocks = [
        _stage_ledger(run.directory / stage.name, stage.name, stage.manifest.get("metrics", {}))
        for stage in run.stages
        if (run.directory / stage.name / LEDGER_FILE).is_file()
    ]
    if not blocks:
        return None
    return tag("section", tag("h2", "Data ledger"), *blocks)


def _stage_ledger(folder: Path, name: str, metrics: dict[str, float]) -> Markup:
    rows = read_lines(folder / LEDGER_FILE, [])
    counts = Counter(str(row.get("reason")) for row in rows)
    kept = metrics.get("rows/kept")
    summary = "" if kept is None else f"{number(kept)} rows kept, "
    summary += f"{len(rows) - counts[PROMPT_CUT]} dropped"
    lines: list[list[object]] = []
    for reason, count in counts.most_common():
        examples = [row for row in rows if row.get("reason") == reason][:NUM_SHOWN]
        shown = join(*(tag("div", _dropped_row(row)) for row in examples))
        lines.append([reason, count, shown])
    return join(
        tag("h3", name, tag("small", summary)),
        table(["reason", "rows", "first examples"], lines) if lines else None,
    )


def _dropped_row(row: dict) -> str:
    rest = {k: v for k, v in row.items() if k not in ("reason", "source")}
    details = ", ".join(f"{key} {value}" for key, value in rest.items())
    return f"{row.get('source')}: {details}"[:200]


def preflight(run: RunRecord) -> Markup | None:
    """Return the section with each stage's preflight card; cards with findings are expanded."""
    cards = [card for s in run.stages if (card := _read_card(run.directory / s.name / CARD_FILE))]
    if not cards:
        return None
    intro = "Measured on the stage's own rows and model before its first step."
    return tag("section", tag("h2", "Preflight"), tag("p", intro), *(_card(c) for c in cards))


def _read_card(path: Path) -> Card | None:
    try:
        return read_card(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # The stage has no card, or another version of align wrote it.


def _card(card: Card) -> Markup:
    rows: list[list[object]] = [
        [
            line.name,
            tag("span", line.verdict, class_=CLASSES.get(line.verdict)),
            line.value,
            line.bound,
            line.remedy if line.verdict != "ok" else "",
            f"{line.seconds:.2f} s",
        ]
        for line in card.lines
    ]
    passed = all(line.verdict == "ok" for line in card.lines)
    heads: list[object] = ["check", "verdict", "measured", "bound", "what to do", "time"]
    return tag(
        "details", tag("summary", title(card)), table(heads, rows), open=None if passed else "open"
    )
