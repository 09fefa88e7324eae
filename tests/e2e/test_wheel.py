"""The wheel, installed where there is no checkout: it holds every file, checks and trains."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest
from openai import APIConnectionError, OpenAI
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from align.core.extras import TRAINING
from align.pipeline.processes import free_port
from tests.serve.running import WAIT_S
from tests.serve.tiny_model import JOB_KEYS, SUPERVISED, jsonl, save_model, user

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


CHEAP = (
    *("base.steps=2", "base.data.0.rows=64", "base.batch_size=8"),
    *("sft.steps=1", "sft.data.0.rows=64", "sft.heldout.0.rows=8", "sft.batch_size=8"),
    *("reward.steps=1", "reward.data.0.rows=32", "reward.heldout.0.rows=8", "reward.batch_size=8"),
    *("reward.ranks=1", "reward.zero.stage=0", "reward.norm_prompts=8"),
    *("dpo.steps=1", "dpo.data.0.rows=32", "dpo.heldout.0.rows=8", "dpo.batch_size=8"),
    *("ppo.steps=1", "ppo.prompts.0.rows=32", "ppo.prompts_per_step=4", "ppo.watch=null"),
    *("ppo.sampling.engine=hf", "ppo.sampling.max_new_tokens=4"),
    *("grpo.steps=1", "grpo.prompts.0.rows=32", "grpo.prompts_per_step=2", "grpo.group_size=2"),
    *("grpo.sampling.engine=hf", "grpo.sampling.max_new_tokens=4"),
    "evaluate.models=[sft, grpo]",
    *("evaluate.prompts.0.rows=4", "evaluate.pairs.0.rows=8", "evaluate.expect={}"),
    *("evaluate.sampling.engine=hf", "evaluate.sampling.max_new_tokens=4"),
)
"""Settings with which every stage of the quickstart runs in seconds."""


@pytest.mark.slow
def test_every_stage_of_the_quickstart_runs_outside_the_checkout(site: Path, tmp_path: Path):
    where = "import align, reward_models; print(align.__file__, reward_models.__file__)"
    places = work("-c", where, cwd=tmp_path, site=site).split()
    assert all(Path(place).is_relative_to(site) for place in places)
    words = ["quickstart", *(word for text in CHEAP for word in ("--set", text))]
    work("-m", "align", "run", *words, cwd=tmp_path, site=site)
    shown = json.loads(work("-m", "align", "show", *words, "--json", cwd=tmp_path, site=site))
    stages = ["base", "sft", "reward", "dpo", "ppo", "grpo", "evaluate"]
    assert [(entry["name"], entry["status"]) for entry in shown["plan"]] == [
        (name, "done") for name in stages
    ]
    results = json.loads(
        work("-m", "align", "show", "runs/quickstart", "--json", cwd=tmp_path, site=site)
    )
    assert set(results["stages"]) == set(stages)
    assert (tmp_path / "runs/quickstart/report.html").is_file()
    said = subprocess.run(
        [sys.executable, "-m", "align", "chat", "quickstart/grpo", "--max-new-tokens", "1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        input="hello\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-3000:]


def test_files_of_recipes_are_found_outside_the_checkout(site: Path, tmp_path: Path):
    facts = "from align.recipe.load import load_recipe; from pathlib import Path; "
    facts += "print(Path(load_recipe('ewc').stages['base'].data[0].path).is_file())"
    assert work("-c", facts, cwd=tmp_path, site=site) == "True\n"


def declared(names: list[str], found: dict[str, metadata.Distribution]) -> None:
    """Add the distributions that requirement lines name, and what they require in turn."""
    for line in names:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if canonicalize_name(requirement.name) not in found:
            distribution = metadata.distribution(requirement.name)
            found[canonicalize_name(requirement.name)] = distribution
            declared(distribution.requires or [], found)


@pytest.fixture(scope="module")
def light(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and exactly what its plain installation declares."""
    folder = tmp_path_factory.mktemp("light")
    (info,) = site.glob("align_suite-*.dist-info")
    found: dict[str, metadata.Distribution] = {}
    declared(metadata.Distribution.at(info).requires or [], found)
    assert "pydantic" in found
    assert not {"torch", "transformers", "datasets", "deepspeed"} & set(found)
    for distribution in found.values():
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            place = Path(str(distribution.locate_file(top)))
            if place.exists() and not (folder / top).exists():
                (folder / top).symlink_to(place)
    for place in site.iterdir():
        if place.name != "bin":
            (folder / place.name).symlink_to(place)
    return folder


def lightly(*words: str, light: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run align with nothing but the light folder on Python's path (-S: no site-packages)."""
    env = {"PYTHONPATH": str(light), "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    command = [sys.executable, "-S", "-m", "align", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_the_light_core_works_without_torch(light: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    (tmp_path / "foreign.yaml").write_text(
        "model_name_or_path: a/b\nfinetuning_type: full\nstage: sft\ndataset: rows.jsonl\n"
        "output_dir: out/made\n"
    )
    probe = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('transformers'))"
    env = {"PYTHONPATH": str(light)}
    command = [sys.executable, "-S", "-c", probe]
    nothing = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert nothing.stdout == "None None\n"
    for words, told in (
        (("check", "quickstart"), "valid, 7 stages"),
        (("show", "quickstart", "--json"), '"plan"'),
        (("run", "quickstart", "--dry-run"), "nothing is started"),
        (("schema",), '"$defs"'),
        (("data", "check", "rows.jsonl"), "characters per row"),
        (("data", "convert", "rows.jsonl", "o.parquet", "--to", "messages"), "2 rows"),
        (("data", "check", "o.parquet"), "characters per row"),
        (("import", "llamafactory", "foreign.yaml"), "made.yaml: valid"),
        (("--version",), "align "),
    ):
        done = lightly(*words, light=light, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr)
        assert told in done.stdout, words


@pytest.mark.parametrize(
    "words",
    [
        ("run", "quickstart"),
        ("chat", "quickstart/sft"),
        ("check", "quickstart", "--deep"),
        ("data", "check", "rows.jsonl", "--model", "a/b"),
    ],
)
def test_a_missing_extra_is_one_line_with_the_pip_command(
    words: tuple[str, ...], light: Path, tmp_path: Path
):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    done = lightly(*words, light=light, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "torch" in line
    assert line.endswith("pip install 'align-suite[train]'")
    assert not (tmp_path / "runs").exists()


def test_tasks_and_the_rules_of_data_are_found_outside_the_checkout(site: Path, tmp_path: Path):
    tasks = "from align.recipe.load import shipped_tasks; print(*shipped_tasks())"
    assert "world" in work("-c", tasks, cwd=tmp_path, site=site).split()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    work("-m", "align", "data", "check", "rows.jsonl", cwd=tmp_path, site=site)


@contextmanager
def served(site: Path, folder: Path) -> Iterator[tuple[OpenAI, str]]:
    """Yield the official client of ``align serve`` outside of the checkout, and a login address."""
    model, port = str(save_model(folder / "model")), str(free_port())
    token = work("-m", "align", "serve", "--new-token", "alice", cwd=folder, site=site).strip()
    words = ["serve", "--port", port, "--model", f"small={model}", "--engine", "hf"]
    words += [word for key in JOB_KEYS for word in ("--set", key)]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(site)}
    with (folder / "said.txt").open("w") as said:
        server = subprocess.Popen(
            [sys.executable, "-m", "align", *words], cwd=folder, env=env, stderr=said
        )
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, timeout=WAIT_S)
    try:
        deadline = time.monotonic() + WAIT_S
        while True:
            assert server.poll() is None, (folder / "said.txt").read_text()
            try:
                client.models.list()
                break
            except APIConnectionError:
                assert time.monotonic() < deadline, (folder / "said.txt").read_text()
        yield client, re.findall(r"http\S+code=\S+", (folder / "said.txt").read_text())[0]
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_the_server_runs_outside_the_checkout(site: Path, tmp_path: Path):
    with served(site, tmp_path) as (client, address), httpx.Client(timeout=WAIT_S) as browser:
        assert [model.id for model in client.models.list()] == ["small"]
        place = address.partition("/login")[0]
        assert browser.get(address).status_code == 200
        for path in ("/", "/labels"):
            page = browser.get(place + path).text
            needs = re.findall(r'(?:src|href)="(/(?:static|live)/[^"]+)"', page)
            assert needs
            for need in needs:
                assert browser.get(place + need).status_code == 200, need


@pytest.mark.long
def test_the_official_client_fine_tunes_outside_the_checkout(site: Path, tmp_path: Path):
    with served(site, tmp_path) as (client, _):
        file = client.files.create(file=("rows.jsonl", jsonl(SUPERVISED)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="small", training_file=file.id, suffix="mine")
        while job.finished_at is None:
            time.sleep(0.5)
            job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        assert (tmp_path / "runs" / job.id / "train" / "manifest.json").is_file()
        said = client.chat.completions.create(
            model=job.fine_tuned_model or "", messages=[user("Say sun.")], max_tokens=4
        )
        assert said.usage is not None
        assert 1 <= said.usage.completion_tokens <= 4


def test_the_extra_of_the_server_has_what_its_jobs_need(wheel: Path):
    with ZipFile(wheel) as packed:
        (name,) = [name for name in packed.namelist() if name.endswith("dist-info/METADATA")]
        told = message_from_bytes(packed.read(name)).get_all("Requires-Dist") or []
    found = [Requirement(line) for line in told]

    def needed(extra: str) -> set[str]:
        """Return the names that an extra adds, through the extras that it names."""
        mine = [r for r in found if r.marker and r.marker.evaluate({"extra": extra})]
        mine = [r for r in mine if not r.marker or not r.marker.evaluate({"extra": ""})]
        own = {canonicalize_name(r.name) for r in mine if not r.extras}
        return own.union(*(needed(inner) for r in mine for inner in r.extras))

    assert needed("web") == {"fastapi", "python-multipart", "uvicorn"}
    assert needed("web") | {*TRAINING} <= needed("serve")
