"""The reward-model cards of a run: numbers with intervals, and three pictures each."""

from collections.abc import Mapping
from typing import Any

from align.core.log import CARDS_FILE
from align.report.charts import Series, plot
from align.report.markup import Markup, even, join, table, tag, triple
from align.report.read import RunRecord, read_object

Card = Mapping[str, Any]
HEADLINES = (
    ("pair_accuracy", "pair accuracy"),
    ("length_balanced_accuracy", "pair accuracy, length-balanced"),
    ("best_of_set_accuracy", "best-of-4 accuracy"),
    ("log_loss", "log loss (nats; 0.693 is chance)"),
    ("ece", "calibration error"),
    ("length_correlation", "rank correlation of score and tokens"),
    ("length_correlation_in_pair", "rank correlation of both differences within a pair"),
)
GROUPS = (
    ("by_source", "source"),
    ("by_length", "which response is longer"),
    ("by_refusal", "which response refuses"),
    ("sets_by_source", "source of the sets"),
)


def reward_cards(run: RunRecord) -> Markup | None:
    """Return the section with the cards of every evaluate stage, or None without cards."""
    found = [
        (name, card)
        for stage in run.stages
        if stage.kind == "evaluate"
        for name, card in read_object(run.directory / stage.name / CARDS_FILE, []).items()
    ]
    return cards_section(dict(found)) if found else None


def cards_section(cards: Mapping[str, Card]) -> Markup:
    """Return the section with reward-model cards, keyed by model name."""
    return tag(
        "section",
        tag("h2", "Reward-model cards"),
        tag("p", "On held-out responses, with 95 % confidence intervals clustered by prompt."),
        *(_card(name, card) for name, card in cards.items()),
    )


def _card(name: str, card: Card) -> Markup:
    # What was measured.
    rows: list[list[object]] = [
        [title, triple(card[key])] for key, title in HEADLINES if key in card
    ]
    counts = f"{card['num_pairs']} pairs of {card['num_prompts']} prompts"
    if card.get("num_pairs_too_long"):
        counts += f", {card['num_pairs_too_long']} too long"
    if "num_sets" in card:
        counts += f", {card['num_sets']} sets (chance {even(card['chance'])})"
    # Agreement with a second reward model, where one was given.
    other = card.get("agreement")
    if other and "same_side" in other:
        rows.append([f"prefers the same response as {other['with']}", triple(other["same_side"])])
        rows.append(
            [f"pair accuracy minus that of {other['with']}", triple(other["accuracy_difference"])]
        )
    # A breakdown into a single group repeats the headline number.
    groups = [_group(title, card[key]) for key, title in GROUPS if len(card.get(key, ())) > 1]
    return join(
        tag("h3", name, tag("small", counts)),
        tag("div", *_pictures(card), class_="charts"),
        table(["", "value"], rows, class_="numbers"),
        tag("details", tag("summary", "By source, length and refusal"), *groups)
        if groups
        else None,
    )


def _group(title: str, groups: Mapping[str, Any]) -> Markup:
    rows: list[list[object]] = [
        [name, entry["num_pairs"], triple(entry["accuracy"])] for name, entry in groups.items()
    ]
    return table([title, "number", "accuracy"], rows, class_="numbers")


def _pictures(card: Card) -> list[Markup]:
    return [
        picture
        for picture in (_calibration_plot(card), _groups_plot(card), _best_of_n_plot(card))
        if picture is not None
    ]


def _calibration_plot(card: Card) -> Markup:
    """Return the calibration plot: pair accuracy against the model's confidence."""
    points = card["calibration"]
    measured = Series(
        "measured",
        [(p["confidence"], p["accuracy"][0]) for p in points],
        [(p["accuracy"][1], p["accuracy"][2]) for p in points],
    )
    ideal = Series("calibrated", [(0.5, 0.5), (1.0, 1.0)], style="dashed", colour=3)
    return plot(
        "calibration",
        [measured, ideal],
        x_label="confidence",
        y_label="accuracy",
        note=f"sigmoid of the score difference, error {even(card['ece'][0])}",
    )


def _groups_plot(card: Card) -> Markup | None:
    """Return the plot of pair accuracy by the relative length of the chosen response."""
    order = ("chosen shorter", "about equal", "chosen longer")
    known = [
        (i, card["by_length"][name]) for i, name in enumerate(order) if name in card["by_length"]
    ]
    if len(known) < 2:
        return None
    found = Series(
        "pair accuracy",
        [(i - 1.0, entry["accuracy"][0]) for i, entry in known],
        [(entry["accuracy"][1], entry["accuracy"][2]) for _, entry in known],
        style="points",
    )
    chance = Series("chance", [(-1.0, 0.5), (1.0, 0.5)], style="dashed", colour=3)
    return plot(
        "length",
        [found, chance],
        x_label="chosen: -1 shorter, 0 equal, 1 longer",
        y_label="accuracy",
    )


def _best_of_n_plot(card: Card) -> Markup | None:
    """Return the plot of the gold score under best-of-n selection, with its upper bound."""
    points = card.get("best_of_n")
    if not points:
        return None
    picked = Series(
        "by this model",
        [(p["n"], p["gold"][0]) for p in points],
        [(p["gold"][1], p["gold"][2]) for p in points],
    )
    ideal = Series(
        "upper bound", [(p["n"], p["best_possible"]) for p in points], style="dashed", colour=3
    )
    return plot("best of n", [picked, ideal], x_label="responses (n)", y_label="gold score")
