"""Pages that are generated, files around the code, and completion in a shell."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import align
from scripts.api_page import api_page
from scripts.pages import API_PAGE, CLI_PAGE, IMPORT_PAGE, cli_page, import_page

ROOT = Path(__file__).resolve().parents[2]


def test_generated_pages_are_up_to_date():
    assert CLI_PAGE.read_text() == cli_page(), "run: python scripts/pages.py"
    assert IMPORT_PAGE.read_text() == import_page(), "run: python scripts/pages.py"
    assert API_PAGE.read_text() == api_page(), "run: python scripts/pages.py"


def test_the_page_of_the_python_api_names_everything_that_is_offered():
    text = API_PAGE.read_text()
    names = [name for name in align.__all__ if name not in ("Run", "rewards", "losses")]
    offered = [f"align.{name}" for name in names if name != "__version__"]
    offered += [f"align.losses.{name}" for name in align.losses.__all__]
    offered += [f"Run.{name}" for name in dir(align.Run) if not name.startswith("_")]
    assert [name for name in offered if f"\n### {name}\n" not in text] == []
    assert [name for name in align.rewards.__all__ if f"`{name}`" not in text] == [
        *("RewardSpec", "build")
    ]
    # Every argument is named in its signature with its type, and no section stays unformatted.
    assert "    model: Model,\n    data: Data,\n    heldout: Data | None = None,\n" in text
    assert not re.search(r"^(Args|Returns|Raises|Reference):$", text, re.M)


def test_the_page_of_commands_has_every_command_of_the_help():
    done = subprocess.run(
        [sys.executable, "-m", "align", "-h"],
        env={"PYTHONPATH": str(ROOT), "TERM": "dumb", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    listed = done.stdout.partition("─ Start ─")[2].splitlines()  # after the options
    names = {words[1] for line in listed if len(words := line.split()) > 2 and words[0] == "│"}
    assert {"run", "import", "init", "data"} <= names
    page = CLI_PAGE.read_text()
    assert [name for name in sorted(names) if f"\n## align {name}" not in page] == []


@pytest.mark.parametrize(
    ("typed", "expected"), [("align ini", "init"), ("align run --dr", "--dry")]
)
def test_a_shell_completes_commands_and_options(typed: str, expected: str):
    # What bash's function runs: the words so far and the place of the last one.
    program = "import sys; sys.argv = ['align']; from align.__main__ import main; main()"
    words = typed.split()
    env = {"COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT), "_ALIGN_COMPLETE": "complete_bash", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert any(line.startswith(expected) for line in done.stdout.split()), done.stderr


def test_files_for_forges_are_valid_yaml_and_name_targets_that_exist():
    flow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    targets = (ROOT / "Makefile").read_text()
    steps = [step.get("run", "") for job in flow["jobs"].values() for step in job["steps"]]
    for target in (run.removeprefix("make ") for run in steps if run.startswith("make ")):
        assert f"\n{target}: " in targets
    used = [
        step["uses"] for job in flow["jobs"].values() for step in job["steps"] if "uses" in step
    ]
    assert len(used) == 7
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(file.read_text())
