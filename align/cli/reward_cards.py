"""Cards of reward models, which ``align eval`` writes for them: they cannot generate."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.artifacts import artifact_kind, find_model
from align.core.errors import EXIT_OK, RecipeError
from align.core.log import CARDS_FILE
from align.pipeline.processes import run_tool
from align.pipeline.terminal import Terminal
from align.report import build_cards
from align.report.card import HEADLINES

PAGE_FILE = "card.html"


def scorers_among(checkpoints: Sequence[str], runs: Path) -> list[Path]:
    """Return the folders of the checkpoints if they are reward models, [] if they are policies.

    Raises:
        RecipeError: reward models and policies are mixed.
    """
    found = []
    for name in dict.fromkeys(checkpoints):
        place = find_model(name, runs)
        if artifact_kind(place) == "reward_model":
            found.append(place)
    if found and len(found) != len(set(checkpoints)):
        raise RecipeError(
            "reward models and policies cannot be evaluated together. Run align eval once for each"
        )
    return found


def measure_scorers(
    places: Sequence[Path],
    *,
    pairs: Sequence[Path],
    sets: Sequence[Path],
    runs: Path,
    out: Path | None,
) -> int:
    """Write cards.json and card.html of reward models and print the headline numbers.

    Args:
        places: folders of reward models.
        pairs: files of held-out pairs; if empty, the pairs that the first model's stage held out.
        sets: files of response sets (RewardBench 2).
        runs: folder of the results.
        out: folder of this result; None derives its name from the options.

    Returns:
        The exit code of the process.
    """
    options = ["--sets", _as_data(sets)] + (["--pairs", _as_data(pairs)] if pairs else [])
    asked = json.dumps([[str(p.resolve()) for p in places], options])
    # The folder is named by the options, so equal options overwrite their own results.
    digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
    folder = out or runs / f"card-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / CARDS_FILE
    code = run_tool("reward_cards", [*map(str, places), *options, "--out", str(target)])
    if code == EXIT_OK:
        cards = json.loads(target.read_text(encoding="utf-8"))
        build_cards(folder / PAGE_FILE, cards)
        for line in card_lines(cards):
            Terminal().line(line)
        Terminal().line(str(folder / PAGE_FILE))
    return code


def _as_data(files: Sequence[Path]) -> str:
    return json.dumps([{"path": str(file)} for file in files])


def card_lines(cards: Mapping[str, Any]) -> list[str]:
    """Return the headline numbers of each card with their intervals, one per line."""
    lines = []
    for name, card in cards.items():
        lines.append(f"{name}: {card['num_pairs']} pairs, {card['num_pairs_too_long']} too long")
        for key, title in HEADLINES:
            if key in card:
                value, low, high = card[key]
                spread = "" if low is None else f" [{low:.3f}, {high:.3f}]"
                lines.append(f"  {title}: {value:.3f}{spread}")
    return lines
