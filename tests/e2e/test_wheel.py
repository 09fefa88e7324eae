"""The wheel, installed where there is no checkout: it holds every file, checks and trains."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("align", "reward_models", "recipes", "pyproject.toml", "README.md", "LICENSE")


def work(*words: str, cwd: Path, site: Path | None = None) -> str:
    """Run Python with these words; it must end well."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if site is not None:
        # Before the environment's own folder, where the checkout may be installed.
        env["PYTHONPATH"] = str(site)
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / part, source / part)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    work("-m", "pip", "wheel", "--quiet", *flags, ".", cwd=source)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    flags = ["--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    work("-m", "pip", "install", *flags, str(wheel), cwd=folder)
    return folder


def test_wheel_holds_every_file_of_the_packages_and_the_recipes(wheel: Path):
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        path.relative_to(ROOT).as_posix()
        for package in ("align", "reward_models")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "recipes" not in path.parts
    }
    recipes = {f"align/{p.relative_to(ROOT).as_posix()}" for p in ROOT.glob("recipes/**/*.*l")}
    assert len(recipes) > 10
    assert packed == files | recipes


@pytest.mark.slow
def test_a_shipped_recipe_is_checked_shown_and_begun_outside_the_checkout(
    site: Path, tmp_path: Path
):
    where = "import align, reward_models; print(align.__file__, reward_models.__file__)"
    places = work("-c", where, cwd=tmp_path, site=site).split()
    assert all(Path(place).is_relative_to(site) for place in places)
    assert "valid, 7 stages" in work("-m", "align", "check", "quickstart", cwd=tmp_path, site=site)
    facts = "from align.recipe.load import load_recipe; from pathlib import Path; "
    facts += "print(Path(load_recipe('ewc').stages['base'].data[0].path).is_file())"
    assert work("-c", facts, cwd=tmp_path, site=site) == "True\n"
    settings = ["seed=3", "stages.base.steps=2", "stages.base.data.0.rows=64", "stages.sft.steps=1"]
    words = ["quickstart", *(word for text in settings for word in ("--set", text))]
    work("-m", "align", "run", *words, "--only", "base", cwd=tmp_path, site=site)
    assert (tmp_path / "runs/quickstart/base/model/model.safetensors").is_file()
    shown = work("-m", "align", "show", *words, cwd=tmp_path, site=site)
    assert "base base done" in " ".join(shown.split())
    said = subprocess.run(
        [sys.executable, "-m", "align", "chat", "runs/quickstart/base", "--max-new-tokens", "1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        input="hello\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-3000:]


def test_tasks_and_the_rules_of_data_are_found_outside_the_checkout(site: Path, tmp_path: Path):
    tasks = "from align.recipe.load import shipped_tasks; print(*shipped_tasks())"
    assert "world" in work("-c", tasks, cwd=tmp_path, site=site).split()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    work("-m", "align", "data", "check", "rows.jsonl", cwd=tmp_path, site=site)
