"""Both rollout engines against each other and against a float64 forward pass."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from engine_models import exact_logprobs, save_tiny, tiny_model

from align.core.errors import DataError, TrainingError
from align.core.types import PromptRow
from align.recipe.schema import SamplingSpec
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions, RolloutEngine
from align.sampling.push import check_answers
from align.sampling.push import push as proven_push
from align.sampling.rollout import sample_groups
from align.tuning.export import full_weights

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)
KINDS = ["hf", pytest.param("vllm", marks=needs_vllm)]
PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10], [11]]
LONG_PROMPT = [(7 * i + 3) % 61 + 2 for i in range(80)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def model_dir(tied: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(0, tied=tied), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engines(model_dir: Path) -> Iterator[dict[str, RolloutEngine]]:
    kinds = ["hf", "vllm"] if importlib.util.find_spec("vllm") else ["hf"]
    built = {
        kind: build_engine(
            kind, EngineOptions(model_dir, max_model_len=128, cache_gib=0.02, stop_token_ids=(1,))
        )
        for kind in kinds
    }
    yield built
    for engine in built.values():
        engine.close()


@pytest.fixture
def engine(engines: dict[str, RolloutEngine], kind: str, tied: bool) -> RolloutEngine:
    """Give an engine that is back on the weights of seed 0."""
    push(engines[kind], tiny_model(0, tied=tied), version=1)
    return engines[kind]


def push(engine: RolloutEngine, model: torch.nn.Module, *, version: int) -> None:
    proven_push(engine, full_weights(model), version=version)


@needs_vllm
@pytest.mark.parametrize("seed", [0, 1])
def test_engines_give_the_same_greedy_tokens(engines, tied, seed):
    answers = {}
    for kind, engine in engines.items():
        push(engine, tiny_model(seed, tied=tied), version=seed)
        groups = engine.generate(PROMPTS, n=2, max_new_tokens=12, temperature=0.0)
        assert all(a.token_ids == b.token_ids for a, b in groups)
        answers[kind] = [(a.token_ids, a.finish_reason, a.text) for a, _ in groups]
    assert answers["vllm"] == answers["hf"]


@pytest.mark.parametrize("kind", KINDS)
def test_engine_after_a_push_answers_with_the_new_weights(engine, tied):
    old, new = tiny_model(0, tied=tied), tiny_model(1, tied=tied)
    # Two full cache blocks of this prompt are computed with the old weights first.
    engine.generate([LONG_PROMPT], n=1, max_new_tokens=4, temperature=0.0)
    push(engine, new, version=7)
    for prompt in [LONG_PROMPT, *PROMPTS]:
        answer = engine.generate([prompt], n=1, max_new_tokens=4, temperature=0.0)[0][0]
        exact = exact_logprobs(new, prompt, answer.token_ids)
        assert answer.logprobs == pytest.approx(exact, abs=1e-3)
        assert answer.weights_version == 7
        # The oracle can tell the two sets of weights apart.
        before = exact_logprobs(old, prompt, answer.token_ids)
        assert max(abs(a - b) for a, b in zip(before, exact, strict=True)) > 0.1
    exact = exact_logprobs(new, LONG_PROMPT[:1], LONG_PROMPT[1:])
    assert engine.token_logprobs(LONG_PROMPT) == pytest.approx(exact, abs=1e-3)


@needs_vllm
def test_vllm_shares_cached_prefixes_until_a_push(engines, tied):
    from vllm import SamplingParams

    llm, greedy = engines["vllm"]._llm, SamplingParams(temperature=0, detokenize=False)
    cached = []
    for version in (1, 1, 2):
        if version == 2:
            push(engines["vllm"], tiny_model(1, tied=tied), version=2)
        prompt = {"prompt_token_ids": LONG_PROMPT[::-1]}
        output = llm.generate([prompt], greedy, use_tqdm=False)[0]
        cached.append(output.num_cached_tokens)
    assert cached == [0, 64, 0]  # 80 tokens hold two whole blocks of 32


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_logprobs_are_those_of_the_tempered_softmax(engine, tied):
    model = tiny_model(0, tied=tied)
    groups = engine.generate(PROMPTS, n=3, max_new_tokens=8, temperature=0.7, seeds=[5, 6, 7])
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for answer in group:
            exact = exact_logprobs(model, prompt, answer.token_ids, temperature=0.7)
            assert answer.logprobs == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_engine_keeps_the_stop_token_and_says_why_it_ended(engine):
    free = engine.generate([PROMPTS[0]], n=1, max_new_tokens=8, temperature=0.0, stop_token_ids=())
    ids = free[0][0].token_ids
    assert (len(ids), free[0][0].finish_reason) == (8, "length")
    stop = ids[3]
    end = ids.index(stop) + 1
    answer = engine.generate(
        [PROMPTS[0]], n=1, max_new_tokens=8, temperature=0.0, stop_token_ids=[stop]
    )[0][0]
    assert answer.token_ids == ids[:end]
    assert len(answer.logprobs) == end
    assert answer.finish_reason == "stop"
    assert f"w{stop}" not in answer.text
    # A stop token sampled as the very last allowed token still is a stop.
    last = engine.generate(
        [PROMPTS[0]], n=1, max_new_tokens=end, temperature=0.0, stop_token_ids=[stop]
    )[0][0]
    assert (last.token_ids, last.finish_reason) == (ids[:end], "stop")


@pytest.mark.parametrize("kind", KINDS)
def test_engine_draws_depend_on_the_seed_alone(engine):
    def tokens(prompts, n, seeds):
        groups = engine.generate(prompts, n=n, max_new_tokens=10, temperature=1.0, seeds=seeds)
        return [[answer.token_ids for answer in group] for group in groups]

    first = tokens(PROMPTS, 3, [100, 200, 300])
    assert tokens(PROMPTS, 3, [100, 200, 300]) == first
    assert tokens(PROMPTS, 3, [101, 201, 301]) != first
    assert len(set(first[0])) > 1
    # Answer k draws with seed + k, whatever else is in the batch.
    assert tokens([PROMPTS[1]], 1, [202]) == [[first[1][2]]]


@pytest.mark.parametrize("kind", KINDS)
def test_engine_takes_more_prompt_tokens_than_one_step_holds(engine):
    # 60 x 90 tokens: vLLM's step holds 4096 and must not cut a seeded request in two.
    prompts = [[(i * t + t + 5) % 62 + 2 for t in range(90)] for i in range(60)]
    seeds = list(range(0, 6000, 100))
    groups = engine.generate(prompts, n=2, max_new_tokens=2, temperature=1.0, seeds=seeds)
    alone = engine.generate([prompts[45]], n=2, max_new_tokens=2, temperature=1.0, seeds=[4500])
    assert [a.token_ids for a in groups[45]] == [a.token_ids for a in alone[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_engine_at_work_leaves_the_trainer_random_state_alone(engine, tied):
    model = tiny_model(0, tied=tied)
    before = torch.get_rng_state()
    push(engine, model, version=2)
    engine.token_logprobs(LONG_PROMPT)
    first = engine.generate(PROMPTS, n=2, max_new_tokens=6, temperature=1.0)
    second = engine.generate(PROMPTS, n=2, max_new_tokens=6, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert first != second  # calls without seeds are not the same draw again


@pytest.mark.parametrize("kind", KINDS)
def test_sample_groups_repeats_a_step_and_changes_with_it(engine):
    rows = [PromptRow(input_ids=tuple(ids), prompt="", columns={}) for ids in PROMPTS]
    spec = SamplingSpec(max_new_tokens=8)

    def groups(step, seed, rows=rows, positions=None):
        return sample_groups(
            engine,
            rows,
            n=2,
            step=step,
            seed=seed,
            sampling=spec,
            stop_token_ids=(1,),
            positions=positions,
        )

    assert groups(3, 0) == groups(3, 0)
    assert groups(4, 0) != groups(3, 0) != groups(3, 1)
    assert groups(3, 0, []) == []
    # In another batch the products add in another order: the same tokens, up to rounding.
    some, whole = groups(3, 0, rows[1::2], range(len(rows))[1::2]), groups(3, 0)[1::2]
    for found, expected in zip(chain(*some), chain(*whole), strict=True):
        assert found.token_ids == expected.token_ids
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


FP32_ROUNDING = torch.full((5,), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_check_answers_refuses_an_engine_on_old_weights(engine, tied):
    new, probe = tiny_model(1, tied=tied), LONG_PROMPT[:6]
    wanted = torch.tensor(exact_logprobs(new, probe[:1], probe[1:]))
    with pytest.raises(TrainingError, match=r"weights version 1: .* nats apart"):
        check_answers(engine, probe, logprobs=wanted, rounding=FP32_ROUNDING)
    push(engine, new, version=2)
    assert check_answers(engine, probe, logprobs=wanted, rounding=FP32_ROUNDING).max() < 1e-3
    wanted[1] = float("nan")
    with pytest.raises(TrainingError, match="weights version 2"):
        check_answers(engine, probe, logprobs=wanted, rounding=FP32_ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_engine_refuses_weights_that_are_not_its_own(engine, tied):
    named = list(full_weights(tiny_model(1, tied=tied)))
    with pytest.raises(TrainingError, match=r"version 9: .*surplus"):
        engine.load_weights(iter([*named, ("model.surplus.weight", torch.ones(2))]), version=9)
    without = [(name, tensor) for name, tensor in named if "layers.1" not in name]
    with pytest.raises(TrainingError, match=r"version 9: \d+ missing .*layers\.1"):
        engine.load_weights(iter(without), version=9)
    assert engine.version == 1


@pytest.mark.parametrize("kind", KINDS)
def test_engine_names_a_prompt_that_does_not_fit(engine):
    with pytest.raises(DataError, match="prompt 1 of the batch has 125 tokens"):
        engine.generate([[3], [4] * 125], n=1, max_new_tokens=4, temperature=1.0)
    with pytest.raises(DataError, match="prompt 0 of the batch has no tokens"):
        engine.generate([[]], n=1, max_new_tokens=4, temperature=1.0)


@needs_vllm
def test_vllm_in_bfloat16_follows_a_push(model_dir, tied):
    # Its bfloat16 weights are packed for other CPU kernels than its float32 weights.
    new = tiny_model(1, tied=tied)
    rounded = tiny_model(1, tied=tied).bfloat16().float()
    engine = build_engine(
        "vllm", EngineOptions(model_dir, dtype="bfloat16", max_model_len=128, cache_gib=0.02)
    )
    push(engine, new, version=1)
    wanted = exact_logprobs(rounded, LONG_PROMPT[:1], LONG_PROMPT[1:])
    found = engine.token_logprobs(LONG_PROMPT)
    differences = [abs(a - b) for a, b in zip(found, wanted, strict=True)]
    assert max(differences) < 0.35
    assert sum(differences) / len(differences) < 0.06
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_engine_is_never_longer_than_the_model(model_dir, kind, caplog):
    with caplog.at_level(logging.INFO, logger="align"):
        engine = build_engine(kind, EngineOptions(model_dir, max_model_len=4096, cache_gib=0.02))
    assert engine.options.max_model_len == 256
    assert "up to 256 tokens" in caplog.text
    engine.close()


@needs_vllm
def test_vllm_start_leaves_random_state_and_threads_alone(model_dir):
    torch.manual_seed(11)
    state, set_num_threads = torch.get_rng_state(), torch.set_num_threads
    engine = build_engine("vllm", EngineOptions(model_dir, max_model_len=64, cache_gib=0.02))
    engine.close()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.set_num_threads is set_num_threads


@pytest.mark.real
@needs_vllm
def test_engines_agree_on_a_real_model(real_data, caplog):
    prompts = [[1, 403, 407, 261], [1, 385, 328, 432, 352, 266]]
    answers = []
    for kind in ("vllm", "hf"):
        engine = build_engine(
            kind,
            EngineOptions(
                real_data / "models" / "stories260K-hd32",
                max_model_len=128,
                cache_gib=0.05,
                stop_token_ids=(2,),
            ),
        )
        groups = engine.generate(prompts, n=1, max_new_tokens=40, temperature=0.0)
        answers.append([group[0].token_ids for group in groups])
        engine.close()
    assert answers[0] == answers[1]
    with caplog.at_level(logging.INFO, logger="align"):
        twin = build_engine(
            "auto", EngineOptions(real_data / "models" / "stories260K", max_model_len=128)
        )
    assert twin.name == "hf"
    assert "head size 8" in caplog.text


@pytest.mark.slow
@needs_vllm
def test_engine_on_two_ranks_takes_zero_2_and_zero_3_weights(tmp_path):
    directory = save_tiny(tiny_model(0, tied=True), tmp_path / "model")
    script = Path(__file__).with_name("two_rank_push.py")
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(script.parents[2]),
    }
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"),
        *(str(script), "--model", str(directory), "--out", str(tmp_path)),
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for rank in range(2):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for stage in ("2", "3"):
            # Trained weights have moved, and the engine follows them.
            assert result[stage]["moved"] > 0.05
            assert result[stage]["difference"] < 1e-3
            assert result[stage]["answers"] == (3 if rank == 0 else 0)
        assert result["sum_after_close"] == 1.0
