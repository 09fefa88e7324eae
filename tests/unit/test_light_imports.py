"""Libraries are imported without heavy parts of others that training does not need."""

import gc
import importlib
import json
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.core.extras import as_if_absent, called_later, without_collections
from align.core.types import Example
from align.data.render.chat import ChatFormat
from align.data.render.templates import TEMPLATES
from align.data.store.columns import record
from align.data.store.layout import Job, pack_rows
from align.data.store.worker import needs_torch

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


def test_a_function_that_is_called_later_imports_its_module_then(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with called_later("colorsys", "rgb_to_hsv"):
        from colorsys import rgb_to_hsv
    assert "colorsys" not in sys.modules
    assert rgb_to_hsv(0.5, 0.5, 0.5) == (0.0, 0.0, 0.5)  # gray has no hue
    assert importlib.import_module("colorsys").rgb_to_hsv is not rgb_to_hsv


def test_what_else_is_imported_from_such_a_module_is_its_own(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with called_later("colorsys", "rgb_to_hsv"):
        import colorsys as light

        assert light.hsv_to_rgb is importlib.import_module("colorsys").hsv_to_rgb


STAGE = """
import json, sys
before = {name.partition(".")[0] for name in sys.modules}
from align.stages import base
base.import_peft()
from align.stages import dpo, sft
print(json.dumps([sorted(before), sorted(sys.modules)]))

from transformers.loss.loss_for_object_detection import linear_sum_assignment as assign
from scipy.optimize import linear_sum_assignment as original
print([part.tolist() for part in assign([[2, 1], [1, 2]])], original is assign)
"""
OF_STAGE = {
    *("align", "reward_models", "jinja2", "markupsafe", "regex", "xxhash", "psutil"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
    *("yaml", "cython_runtime"),
    *("torch", "torchgen", "triton", "numpy", "sympy", "mpmath", "scipy"),  # scipy: its root only
    *("transformers", "tokenizers", "safetensors", "huggingface_hub", "sentencepiece", "PIL"),
    *("accelerate", "peft", "deepspeed", "hjson", "msgpack", "einops", "google"),
    *("httpx", "httpcore", "h11", "anyio", "idna", "certifi", "charset_normalizer"),  # of the hub
    *("filelock", "fsspec", "packaging", "tqdm", "dill", "jaxtyping", "click", "colorama"),
    *("rich", "pygments"),
}
"""Packages that an offline stage imports: torch, what loads and trains a model, and theirs."""


def test_an_offline_stage_imports_what_trains_a_model_only():
    done = subprocess.run([sys.executable, "-c", STAGE], capture_output=True, text=True)
    modules, assigned = done.stdout.splitlines()[-2:]
    before, after = json.loads(modules)
    packages = {name.partition(".")[0] for name in after} - set(before)
    unknown = packages - sys.stdlib_module_names - OF_STAGE
    assert not {name for name in unknown if not name.startswith("_")}, done.stderr
    # Parts of SciPy and torch's compiler take tenths of a second each.
    slow = {"scipy.optimize", "scipy.special", "scipy.stats", "torch._inductor.compile_fx"}
    assert not slow & set(after)
    # The function is scipy's all the same. Columns 1 and 0 have the least sum, 1 + 1.
    assert assigned == "[[0, 1], [1, 0]] False"


def test_vllm_starts_without_the_resampling_of_sound_and_the_tracing_of_requests():
    pytest.importorskip("vllm")
    script = (
        "import gc, sys; from align.sampling.vllm_start import import_llm\n"
        "unused = ('scipy.signal', 'opentelemetry')\n"
        "print(import_llm().__name__, [n for n in unused if n in sys.modules], gc.isenabled())\n"
        "from scipy.signal import resample_poly; print(resample_poly.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["LLM [] True", "resample_poly"], done.stderr


def test_a_process_that_tokenizes_rows_does_it_without_torch(tmp_path):
    chat = ChatFormat(byte_tokenizer(TEMPLATES["chatml"], eos="<|im_end|>"))
    example = Example(
        [{"role": "user", "content": "a"}],
        completion=[{"role": "assistant", "content": "b"}],
        source="rows.jsonl:1",
    )
    examples = tmp_path / "examples"
    examples.write_bytes(record(example))
    job = Job(0, [examples.stat().st_size])
    sent = [needs_torch(chat.sft_row), (chat.sft_row, str(examples)), job]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "align.data.store.worker"],
        input=b"".join(map(pickle.dumps, sent)),
        capture_output=True,
    )
    modules = {line.rpartition(b"|")[2].strip() for line in done.stderr.splitlines()}
    assert b"tokenizers" in modules, done.stderr
    assert b"torch" not in modules
    assert pickle.loads(done.stdout).rows == pack_rows([chat.sft_row(example)])


def test_torch_stays_for_renderers_that_are_not_known(monkeypatch):
    chat = ChatFormat(byte_tokenizer(TEMPLATES["chatml"], eos="<|im_end|>"))
    assert needs_torch(SimpleNamespace().__init__)  # a method of any other object
    assert needs_torch(lambda example: chat.sft_row(example))
    own = type("Own", (type(chat.tokenizer),), {})
    monkeypatch.setattr(chat.tokenizer, "__class__", own)
    assert needs_torch(chat.sft_row)


def test_garbage_is_collected_again_after_imports():
    seen = []
    with suppress(ImportError), without_collections():
        seen.append(gc.isenabled())
        importlib.import_module("no_such_module")
    assert seen == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collections():
            pass
        assert not gc.isenabled()  # whoever disabled it enables it
    finally:
        gc.enable()


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
