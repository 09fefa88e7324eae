"""GGUF and Ollama: what transformers and llama.cpp read is the exported model."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
)

sys.path.insert(0, str(Path(__file__).parent))
from export_models import SIZES, edit, make_run, policy, save, tokenizer

from align.core.errors import ArtifactError
from align.data.render.templates import PLAIN
from align.export import gguf, llama_cpp
from align.export.gguf_tokens import gguf_tokenizer
from align.export.ollama import modelfile
from align.export.parity import PROMPTS, probe_of
from align.export.source import find_source
from align.stages.tools.export import export

# Qwen2.5 writes a system message of its own if the conversation has none.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index ~ ' ' + m['content'] }}{% endfor %}"
CONVERSATIONS = [["user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Return a stage for each way to lay out heads: rotated in pairs or halves, tied or not."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "llama": make_run(folder / "llama"),
        "qwen2": make_run(folder / "qwen2", kind="qwen2", tied=True),
    }


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gguf_is_the_model_that_transformers_reads(runs, tmp_path, kind, dtype):
    pytest.importorskip("gguf", reason="pip install 'align-suite[export]'")
    lines = export(runs[kind], tmp_path / "out", name="gguf", dtype=dtype)
    assert "greedy responses are equal" in lines[0]
    assert lines[1:] == [
        f"llama-server -m {tmp_path / 'out' / 'model.gguf'}",
        f"ollama create {kind}-sft -f {tmp_path / 'out' / 'Modelfile'}",
    ]
    parity = json.loads((tmp_path / "out" / "export.json").read_text())["parity"]
    assert 0.0 < parity["kl_max"] < 0.05


def rotated_as_in_transformers(monkeypatch):
    monkeypatch.setattr(gguf, "_permuted", lambda name, tensor, config: tensor)


def empty_row(monkeypatch):
    real = gguf._permuted

    def damaged(name, tensor, config):
        tensor = real(name, tensor, config).clone()
        if "embed_tokens" in name:
            tensor[300] = 0.0
        return tensor

    monkeypatch.setattr(gguf, "_permuted", damaged)


def scaled(monkeypatch):
    real = gguf._permuted
    monkeypatch.setattr(gguf, "_permuted", lambda n, t, c: real(n, t, c) * 1.05)


def transposed(monkeypatch):
    real = gguf._permuted

    def damaged(name, tensor, config):
        return real(name, tensor.T if "q_proj" in name else tensor, config)

    monkeypatch.setattr(gguf, "_permuted", damaged)


def other_stop(monkeypatch):
    write = gguf._write_tokenizer

    def swapped(writer, found):
        write(writer, replace(found, stop_token_ids=found.stop_token_ids[::-1]))

    monkeypatch.setattr(gguf, "_write_tokenizer", swapped)


FAULTS = {
    rotated_as_in_transformers: "q_proj.weight: a row differs",
    empty_row: "embed_tokens.weight: a row differs",
    scaled: "a row differs from the source by 0.05",
    transposed: "q_proj.weight: a row differs",
    other_stop: r"tokenizer\.ggml\.eos_token_id: differs",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_gguf_fault_is_refused(runs, tmp_path, monkeypatch, fault):
    pytest.importorskip("gguf", reason="pip install 'align-suite[export]'")
    fault(monkeypatch)
    with pytest.raises(ArtifactError, match=FAULTS[fault]):
        export(runs["llama"], tmp_path / "out", name="gguf", dtype="f16")
    assert not list(tmp_path.iterdir())


def test_other_architectures_are_refused_by_name(tmp_path):
    pytest.importorskip("gguf", reason="pip install 'align-suite[export]'")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GPTNeoXConfig(vocab_size=320, intermediate_size=32, eos_token_id=2, **sizes)
    save(GPTNeoXForCausalLM(config), tmp_path / "neox")
    with pytest.raises(ArtifactError, match="model type 'gpt_neox'"):
        export(tmp_path / "neox", tmp_path / "out", name="gguf")
    save(policy(), tmp_path / "scaled")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    edit(tmp_path / "scaled" / "config.json", rope_parameters=rope)
    with pytest.raises(ArtifactError, match="rotary type 'linear'"):
        export(tmp_path / "scaled", tmp_path / "out", name="gguf")


def test_a_yarn_model_keeps_its_rotary_scaling_and_is_refused_by_gguf(tmp_path):
    source, out = tmp_path / "scaled", tmp_path / "out"
    save(policy(), source)
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    rope["original_max_position_embeddings"] = SIZES["max_position_embeddings"] // 4
    edit(source / "config.json", rope_parameters=rope)
    export(source, out, name="model", dtype="float32")
    written = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert {key: written[key] for key in rope} == rope
    ids = torch.arange(4, 44)[None]
    models = [AutoModelForCausalLM.from_pretrained(place) for place in (source, out)]
    # The weights with the usual positions, which a lost key would give.
    models.append(policy())
    models[-1].load_state_dict(models[0].state_dict())
    with torch.inference_mode():
        found = [model.eval()(ids).logits for model in models]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)
    pytest.importorskip("gguf", reason="pip install 'align-suite[export]'")
    with pytest.raises(ArtifactError, match="rotary type 'yarn'"):
        export(source, tmp_path / "gguf", name="gguf")


def test_the_rotary_factors_of_llama_3_are_those_of_a_calculator():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=rope)
    factors = gguf.rope_factors(config)
    assert factors is not None
    assert factors.shape == (64,)
    # Wavelengths 2 pi 500000^(i/64): i = 28 has 1956 tokens (below 8192 / 4), i = 35 has 8219.
    assert factors[:29].tolist() == [1.0] * 29
    assert factors[35:].tolist() == [8.0] * 29
    # i = 32: 2 pi sqrt(500000) = 4442.883 tokens, 8192 / 4442.883 = 1.843848 turns, of which
    # (1.843848 - 1) / 3 = 0.281283 is kept: 1 / (0.718717 / 8 + 0.281283) = 2.694530.
    assert factors[32].item() == pytest.approx(2.69452969, rel=1e-6)
    assert torch.all(factors[28:36].diff() > 0)
    assert gguf.rope_factors(LlamaConfig()) is None


def test_a_policy_with_scaled_rotation_is_exported_and_a_lost_scale_is_refused(
    tmp_path, monkeypatch
):
    pytest.importorskip("gguf", reason="pip install 'align-suite[export]'")
    save(policy(), tmp_path / "scaled")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    edit(tmp_path / "scaled" / "config.json", rope_parameters=rope)
    lines = export(tmp_path / "scaled", tmp_path / "out", name="gguf", dtype="f16")
    assert "8 of 8 greedy responses are equal" in lines[0]
    monkeypatch.setattr(gguf, "rope_factors", lambda config: None)
    with pytest.raises(ArtifactError, match="per-token KL is up to"):
        export(tmp_path / "scaled", tmp_path / "lost", name="gguf", dtype="f16")


def test_q4_needs_llama_cpp(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match=r"llama-quantize is on PATH, nor is llama-cpp-python"):
        export(runs["llama"], tmp_path / "out", name="gguf", dtype="q4_k_m")
    assert not list(tmp_path.iterdir())


# A package of the same interface that computes with transformers, to break it as no real one is.
STAND_IN = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
GGML_TYPE_F32 = 0
def llama_vocab_is_eog(vocabulary, token):
    return token in vocabulary
class Llama:
    def __init__(self, path, *, n_ctx, logits_all, type_k, type_v, verbose):
        self.model = AutoModelForCausalLM.from_pretrained(
            path.removesuffix("model.gguf"), gguf_file="model.gguf", dtype=torch.float32
        ).eval()
        self._model, self.vocab = self, STOPS
        self.reset()
    def reset(self):
        self.ids, self.n_tokens = [], 0
    @torch.inference_mode()
    def eval(self, tokens):
        self.ids += tokens
        self.n_tokens = len(self.ids)
        self.scores = (FACTOR * self.model(torch.tensor([self.ids])).logits[0]).numpy()
    def tokenize(self, text, *, add_bos):
        return AutoTokenizer.from_pretrained(TOKENIZER)(text.decode() + MORE)["input_ids"]
    def close(self):
        pass
"""
READERS = {
    "same": ((2, 0), 1.0, "", None),
    "louder": ((2, 0), 1.5, "", "per-token KL is up to"),
    "hasty": (tuple(range(320)), 1.0, "", "the response has 1 tokens, expected"),
    "splits": ((2, 0), 1.0, " more", "has the tokens"),
}


@pytest.mark.parametrize("name", READERS)
def test_llama_cpp_must_read_the_same_model(runs, tmp_path, monkeypatch, name):
    pytest.importorskip("gguf", reason="pip install 'align-suite[export]'")
    stops, factor, more, fault = READERS[name]
    package = tmp_path / "site" / "llama_cpp.py"
    package.parent.mkdir()
    facts = {"STOPS": stops, "FACTOR": factor, "MORE": more}
    facts["TOKENIZER"] = str(runs["llama"] / "model")
    package.write_text("".join(f"{k} = {v!r}\n" for k, v in facts.items()) + STAND_IN)
    monkeypatch.syspath_prepend(package.parent)
    path = f"{package.parent}:{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parents[2]}"
    monkeypatch.setenv("PYTHONPATH", path)
    words = {"name": "gguf", "dtype": "f16", "readers": "llama.cpp"}
    if fault is None:
        lines = export(runs["llama"], tmp_path / "out", **words)
        assert lines[1].startswith("read by llama.cpp: ")
        record = json.loads((tmp_path / "out" / "export.json").read_text())
        assert 0.0 <= record["parity_llama_cpp"]["kl_max"] < 1e-3
        return
    with pytest.raises(ArtifactError, match=rf"llama\.cpp reads another model.*{fault}"):
        export(runs["llama"], tmp_path / "out", **words)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_an_export_that_llama_cpp_did_not_read_is_refused_if_it_must(runs, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="pip install 'align-suite[export]'")
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    words = {"name": "gguf", "dtype": "f16"}
    told = "not compared with llama.cpp: llama-cpp-python is not installed"
    assert told in export(runs["llama"], tmp_path / "out", **words, readers="auto")
    with pytest.raises(ArtifactError, match=r"--verify llama\.cpp: not compared: llama-cpp-python"):
        export(runs["llama"], tmp_path / "no", **words, readers="llama.cpp")
    with pytest.raises(ArtifactError, match=r"--verify vllm: .* gguf is read by llama\.cpp"):
        export(runs["llama"], tmp_path / "no", **words, readers="vllm")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_k_m"])
def test_the_real_llama_cpp_reads_the_same_model(tmp_path, monkeypatch, dtype):
    pytest.importorskip("gguf", reason="pip install 'align-suite[export]'")
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    # Whole blocks of 256, and logits as small as those of a trained model.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    for key, value in sizes.items():
        monkeypatch.setitem(SIZES, key, value)
    run = make_run(tmp_path / "run")
    lines = export(run, tmp_path / "out", name="gguf", dtype=dtype, readers="llama.cpp")
    assert lines[1].startswith("read by llama.cpp: ")


def test_tokens_and_merges_are_those_of_the_tokenizer(runs):
    found = gguf_tokenizer(runs["llama"] / "model", num_rows=320)
    ours = tokenizer()
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert [found.tokens[i] for i in range(len(ours))] == ours.convert_ids_to_tokens(
        range(len(ours))
    )
    assert found.tokens[len(ours) :] == [f"[PAD{i}]" for i in range(len(ours), 320)]
    assert found.stop_token_ids == (2, 0)


def rendered(template: str, messages: list[dict[str, str]]) -> str:
    """Render the part of Go's template language that a Modelfile uses."""
    first = re.match(
        r'\{\{ if ne \(index \.Messages 0\)\.Role "(\w+)" \}\}(.*?)\{\{ end \}\}', template, re.S
    )
    start = ""
    if first:
        start = "" if messages[0]["role"] == first[1] else first[2]
        template = template[first.end() :]
    body, end = template.removeprefix("{{ range .Messages }}").rsplit("{{ end }}", 1)
    roles = dict(re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ end \}\}', body, re.S))
    turns = [roles[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages]
    return start + "".join(turns) + end


@pytest.mark.parametrize("template", [None, PLAIN, DEFAULT_SYSTEM])
def test_modelfile_renders_as_the_chat_template(tmp_path, template):
    save(policy(), tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    if template is not None:
        loaded.chat_template = template
        loaded.save_pretrained(tmp_path)
    text = modelfile(tmp_path, "model.gguf") or ""
    found = re.search(r'TEMPLATE """(.*?)"""', text, re.S)
    assert found
    assert text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'PARAMETER stop "<|endoftext|>"' in text
    for roles in CONVERSATIONS:
        messages = [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]
        expected = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered(found[1], messages) == expected


def test_template_that_counts_has_no_modelfile(tmp_path):
    save(policy(), tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.chat_template = NUMBERED
    loaded.save_pretrained(tmp_path)
    assert modelfile(tmp_path, "model.gguf") is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_llama_cpp_reads_the_same_tokens_and_says_the_same(runs, tmp_path, kind):
    pytest.importorskip("gguf", reason="pip install 'align-suite[export]'")
    place = os.environ.get("ALIGN_NODE_LLAMA_CPP")
    if place is None or shutil.which("node") is None:
        pytest.skip(
            "ALIGN_NODE_LLAMA_CPP does not name a folder with the npm package node-llama-cpp"
        )
    export(runs[kind], tmp_path / "out", name="gguf", dtype="f16")
    source = find_source(runs[kind])
    ours = AutoTokenizer.from_pretrained(source.model_dir)
    model = AutoModelForCausalLM.from_pretrained(source.model_dir).eval()
    asked = []
    for text, prompt in zip(PROMPTS, probe_of(source.model_dir).prompts, strict=True):
        ids = torch.tensor([prompt])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        asked.append({"text": text, "ids": list(prompt), "said": said[0, len(prompt) :].tolist()})
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    script = Path(place) / "check_gguf.mjs"
    shutil.copyfile(Path(__file__).with_name("check_gguf.mjs"), script)
    argv = ["node", str(script), str(tmp_path / "out" / "model.gguf"), str(tmp_path / "asked.json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=True, cwd=place)
    found = json.loads(done.stdout.splitlines()[-1])
    for ask, answer in zip(asked, found, strict=True):
        assert answer["tokens"] == ours(ask["text"], add_special_tokens=False)["input_ids"]
    # float16 in another order of sums: a tie may go the other way.
    same = sum(a["said"] == f["said"] for a, f in zip(asked, found, strict=True))
    assert same >= len(asked) - 1
