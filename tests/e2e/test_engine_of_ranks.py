"""One vLLM engine of two ranks (``sampling.tensor_parallel: 2``) answers like an engine of one."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs
from engine_models import exact_logprobs, save_tiny, tiny_decoder
from one_engine_of_ranks import PROMPTS

pytestmark = [pytest.mark.slow]
pytest.importorskip("vllm")


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen2", marks=pytest.mark.long)])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def found(family: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Give what each of two ranks found."""
    folder = tmp_path_factory.mktemp(family)
    save_tiny(tiny_decoder(family, 0), folder / "model")
    worker = str(Path(__file__).with_name("one_engine_of_ranks.py"))
    command = [worker, family, str(folder / "model"), str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSPEED_TIMEOUT", "2000")
        stage_runs.finish_ranks(command, 2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def greedy(model: torch.nn.Module, prompt: list[int], num: int) -> list[int]:
    """Continue a prompt with the most likely tokens, one whole float64 pass for each."""
    double, ids = model.double(), list(prompt)
    with torch.no_grad():
        for _ in range(num):
            ids.append(int(double(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("seed", [1, 2])
def test_each_rank_gets_the_answers_to_its_own_prompts(family, found, seed):
    for rank, prompts in enumerate(PROMPTS):
        together, alone = (found[rank][ranks][str(seed)] for ranks in ("2", "1"))
        exact = [greedy(tiny_decoder(family, seed), prompt, 12) for prompt in prompts]
        assert together["greedy"] == exact
        assert alone["greedy"] == exact
        # The same seeds draw the same tokens, and the answers have the model's log-probabilities.
        assert together["drawn"] == alone["drawn"]
        model = tiny_decoder(family, seed)
        for i, prompt in enumerate(prompts):
            for answer, logprobs in zip(together["drawn"][i], together["logprobs"][i], strict=True):
                assert logprobs == pytest.approx(exact_logprobs(model, prompt, answer), abs=1e-4)
        given = prompts[0] * 2
        expected = exact_logprobs(model, given[:1], given[1:])
        assert together["given"] == pytest.approx(expected, abs=1e-4)


def test_checksums_cover_every_tensor_of_the_parts_of_both_ranks(family, found):
    names = {name for name, _ in tiny_decoder(family, 0).named_parameters()}
    for rank in range(2):
        for seed in ("1", "2"):
            assert found[rank]["2"][seed]["same"] == len(names)
            assert found[rank]["2"][seed]["unplaced"] == []
        # All but the norms are divided; vLLM has a head also where it is the embedding.
        divided = {name for name in names if "norm" not in name} | {"lm_head.weight"}
        assert set(found[rank]["2"]["parts"]) == divided
        assert found[rank]["1"]["parts"] == []


def test_ranks_without_prompts_take_part_and_the_world_outlives_the_engines(found):
    assert [part["2"]["none"] for part in found] == [1, 0]
    assert [part["sum_after_close"] for part in found] == [1.0, 1.0]


def test_workers_of_an_engine_wait_as_long_as_the_ranks(found):
    """Torch's limit for a group is half an hour on CPU, and 10 minutes on a GPU."""
    for part in found:
        assert set(part["2"]["limits"]) == set(part["1"]["limits"]) == {2000 * 60.0}
        assert len(part["2"]["limits"]) > 3  # those of the ranks and ZeRO, and vLLM's own
