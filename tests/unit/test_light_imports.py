"""Libraries are imported without heavy parts of others that training does not need."""

import importlib
import json
import subprocess
import sys

import pytest

from align.core.extras import as_if_absent

SCRIPT = """
import sys
from types import SimpleNamespace
from align.tuning.light_peft import import_peft, peft_for

import_peft()
from peft import import_utils
from peft.tuners import lora

heavy = ("bitsandbytes", "torch._inductor.compile_fx")
print([name for name in heavy if name in sys.modules], import_utils.is_bnb_available())
peft_for(SimpleNamespace(is_quantized=False))
print(import_utils.is_bnb_available())
peft = peft_for(SimpleNamespace(is_quantized=True))
print(import_utils.is_bnb_available(), lora.Linear4bit.__module__, peft.__name__)
"""


def test_peft_learns_of_bitsandbytes_with_the_first_quantized_model():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[] False", "False", "True peft.tuners.lora.bnb peft"], (
        done.stderr
    )


def test_a_loaded_bitsandbytes_is_not_hidden():
    script = (
        "import bitsandbytes, sys; from align.tuning.light_peft import import_peft; import_peft(); "
        "from peft.import_utils import is_bnb_available; "
        "print(is_bnb_available(), sys.modules['bitsandbytes'] is bitsandbytes)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_module_is_absent_inside_the_block_only(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with as_if_absent("colorsys"), pytest.raises(ImportError):
        importlib.import_module("colorsys")
    loaded = importlib.import_module("colorsys")
    with as_if_absent("colorsys"):
        assert importlib.import_module("colorsys") is loaded


def test_vllm_starts_without_the_resampling_of_sound():
    pytest.importorskip("vllm")
    script = (
        "import sys; from align.core.extras import as_if_absent; "
        "from align.sampling.vllm_start import RESAMPLING\n"
        "with as_if_absent(RESAMPLING):\n"
        "    from vllm import LLM\n"
        "print(LLM.__name__, RESAMPLING in sys.modules)\n"
        "from scipy.signal import resample_poly; print(resample_poly.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["LLM False", "resample_poly"], done.stderr


CHECK = """
import json, sys
before = {name.partition(".")[0] for name in sys.modules}
sys.argv = ["align", "check", "r.yaml"]
from align.__main__ import main

try:
    main()
except SystemExit as done:
    assert not done.code
print(json.dumps([sorted(before), sorted(sys.modules)]))
"""
OF_CHECK = {
    *("align", "reward_models", "typer", "shellingham", "annotated_doc"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
    *("yaml", "cython_runtime"),  # its parser is compiled by Cython
}
"""Packages that ``align check`` imports: the command line, the schema and YAML."""


def test_a_check_imports_the_schema_and_readers_only(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    stages = {
        "base": {"kind": "base", "path": "ORG/NAME"},
        "sft": {"kind": "sft", "init": "base", "data": [{"path": "rows.jsonl"}]},
    }
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "stages": stages}))
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    before, after = json.loads(done.stdout.splitlines()[-1])
    packages = {name.partition(".")[0] for name in after} - set(before)
    unknown = packages - sys.stdlib_module_names - OF_CHECK
    # Private names are parts of other packages, such as _cython_3_1_4.
    assert not {name for name in unknown if not name.startswith("_")}, done.stderr
    assert "asyncio" not in packages
    assert not {"align.report", "align.pipeline.running", "align.pipeline.terminal"} & set(after)
    # The recipe's rows were looked at, so what that needs is counted.
    assert "align.data.load" in after
