"""An error shows the line that it is about."""

from pathlib import Path

from align.core.caret import MAX_SHOWN, WIDTH, with_source


def test_a_place_is_followed_by_its_line_and_a_caret_below_the_column(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nstages:\n  sft: {stepz: 10}\n")
    message = f"{path}:3:9: stages.sft.stepz: unknown key; did you mean 'steps'?"
    assert list(with_source(message)) == [
        message,
        "      sft: {stepz: 10}",
        " " * (4 + 8) + "^",
    ]


def test_a_long_line_is_shown_around_the_column(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("x" * 400 + "HERE" + "y" * 400 + "\n")
    _, line, caret = with_source(f"{path}:1:401: wrong")
    assert len(line) <= WIDTH + 4
    at = caret.index("^")
    assert line[at : at + 4] == "HERE"


def test_other_messages_stay_as_they_are(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    for message in ("no stage 'sfft'", f"{missing}:1:1: gone", "http://127.0.0.1:80:1: x: y"):
        assert list(with_source(message)) == [message]


def test_control_characters_of_a_recipe_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: \x1b[31mred\n")
    assert "\x1b" not in "".join(with_source(f"{path}:1:1: name: wrong"))


def test_only_the_first_errors_show_their_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a\n" * 20)
    lines = list(with_source("\n".join(f"{path}:{i}:1: wrong" for i in range(1, 21))))
    assert len(lines) == 20 + 2 * MAX_SHOWN
