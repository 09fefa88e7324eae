"""Plant faults in pushes of weights at learning rate 1e-7, count those found and the false alarms.

    python -m benchmarks.push_faults                      # the table of docs/pushes.md
    python -m benchmarks.push_faults --pushes 500         # false alarms over more clean pushes
    python -m benchmarks.push_faults --model DIR          # clean pushes and cost on a real model

A fault stands between what the trainer sent and what the engine computes with: in the stream of
tensors, in vLLM's loading and packing, in its adapters, in its cache. It is planted where it makes
a difference only: in bfloat16 one step at 1e-7 leaves most numbers, and some tensors, as they were.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}

import torch
from torch import Tensor

from align.core.errors import TrainingError
from align.models.logprobs import LogprobModel
from align.recipe.schema.tuning import LoraTuning
from align.sampling.build import build_engine
from align.sampling.engine import EngineOptions
from align.sampling.push import (
    check_answers,
    measured_rounding,
    probe_logprobs,
    probe_of,
    push,
    pushed_weights,
)
from align.tuning.wrap import add_tuner
from benchmarks.push_kinds import FAULTS, SETUPS, Fault, Named, Setup

RATE, VOCAB = 1e-7, 512
PROMPT = [(7 * i + 3) % (VOCAB - 3) + 2 for i in range(70)]
TUNING = LoraTuning(method="lora", rank=4, alpha=12)


def save_model(folder: Path, *, tied: bool) -> None:
    """Write a random Qwen2 of two layers, with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms of ones and biases of zeros would hide an exchange
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)


class Policy:
    """A policy with float32 master weights that takes Adam's first step, again and again."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, setup.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if setup.adapter:
            model = add_tuner(model, TUNING)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:  # a fresh one is zero, and so would be its exchange
                        parameter += 0.05 * torch.randn(parameter.shape)
        self.model = model.eval()
        self.scored = LogprobModel(self.model)
        self.adapter = setup.adapter
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._masters = [(p, p.detach().float().clone()) for p in trained]

    @torch.no_grad()
    def step(self, seed: int) -> None:
        """Move every master weight by the learning rate, as Adam's first step does.

        The direction is drawn for each column: on a real model, a draw for each weight would take
        longer than the push.
        """
        generator = torch.Generator().manual_seed(seed)
        for parameter, master in self._masters:
            sign = torch.randint(0, 2, master.shape[-1:], generator=generator) * 2.0 - 1.0
            master += RATE * sign
            parameter.copy_(master)

    def named(self) -> Named:
        """Copy what a push sends."""
        return {n: x.clone() for n, x in pushed_weights(self.model, adapter_alone=self.adapter)}


def start(folder: Path, setup: Setup) -> Any:
    """Build the engine of a set-up."""
    kind: Any = "adapter" if setup.adapter else "merged"
    dtype: Any = setup.dtype
    return build_engine(
        setup.engine,
        EngineOptions(
            folder,
            dtype=dtype,
            max_model_len=128,
            cache_gib=0.05,
            tuning=TUNING if setup.adapter else None,
            push=kind,
        ),
    )


def planted(engine: Any, policy: Policy, fault: Fault, old: Named, new: Named) -> str | None:
    """Push with a fault; return what noticed it, or None where the fault makes no difference."""
    arriving: Any = new
    if fault.stream is not None:
        arriving = fault.stream(new, old)
        if arriving is None or same(dict(arriving), new, engine.dtype):
            return None
    load = engine.load_weights

    def faulty(named: Any, *, version: int) -> Any:
        for _ in named:  # the trainer sends everything; what arrives is something else
            pass
        pairs = arriving.items() if isinstance(arriving, dict) else arriving
        return load(iter(pairs), version=version)

    engine.load_weights = faulty if fault.stream is not None else load
    context = fault.engine(engine, old) if fault.engine is not None else contextlib.nullcontext()
    try:
        with context:
            push(engine, iter(new.items()), version=engine.version + 1)
            compare(engine, policy)
    except TrainingError as error:
        return str(error)
    finally:
        engine.load_weights = load
    return "not found"


def same(arriving: Named, new: Named, dtype: torch.dtype) -> bool:
    """Return whether the received weights equal the sent ones in the engine's number format."""
    if arriving.keys() != new.keys():
        return False
    return all(torch.equal(x.to(dtype), new[n].to(dtype)) for n, x in arriving.items())


def compare(engine: Any, policy: Policy) -> None:
    """Compare log-probabilities as a stage does after a push."""
    probe = probe_of(PROMPT)
    logprobs = probe_logprobs(policy.scored, probe)
    check_answers(
        engine, probe, logprobs=logprobs, rounding=measured_rounding(policy.scored, probe, logprobs)
    )


def run_setup(setup: Setup, faults: tuple[Fault, ...], pushes: int) -> tuple[dict[str, str], int]:
    """Plant all faults that fit a set-up; return what was said of each, and the false alarms."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_model(folder, tied=setup.tied)
        policy, engine = Policy(folder, setup), start(folder, setup)
        for i, fault in enumerate(f for f in faults if f.where(setup)):
            policy.step(2 * i)
            old = policy.named()
            push(engine, iter(old.items()), version=engine.version + 1)
            engine.generate([PROMPT], n=1, max_new_tokens=2, temperature=0.0)
            policy.step(2 * i + 1)
            said = planted(engine, policy, fault, old, policy.named())
            if said is not None:
                found[fault.name] = said
        alarms = false_alarms(engine, policy, pushes)
        engine.close()
    return found, alarms


def false_alarms(engine: Any, policy: Policy, pushes: int) -> int:
    """Count the errors of valid pushes."""
    alarms = 0
    for i in range(pushes):
        policy.step(10_000 + i)
        try:
            pushed = pushed_weights(policy.model, adapter_alone=policy.adapter)
            push(engine, pushed, version=engine.version + 1)
            compare(engine, policy)
        except TrainingError as error:
            sys.stderr.write(f"false alarm: {error}\n")
            alarms += 1
    return alarms


def noticed_by(said: str) -> str:
    """Return which check raised an error, in a word or two."""
    words = {
        "checksum": "checksum",
        "missing": "names",
        "packed copy": "packed copy",
        "cache": "cache",
        "rejected": "load",
        "nats apart": "log-probs",
    }
    return next((word for part, word in words.items() if part in said), "no")


def table(pushes: int) -> str:
    """Return the table of found faults by set-up."""
    columns = {setup: run_setup(setup, FAULTS, pushes) for setup in SETUPS}
    lines = [
        "| fault | " + " | ".join(setup.title for setup in SETUPS) + " |",
        "|---|" + "---|" * len(SETUPS),
    ]
    whole = 0
    for fault in FAULTS:
        marks = [
            noticed_by(found[fault.name]) if fault.name in found else ""
            for found, _ in columns.values()
        ]
        whole += "no" not in marks and any(marks)
        lines.append(f"| {fault.name} | {' | '.join(marks)} |")
    lines.append(
        f"| false alarms in {pushes} valid pushes | "
        + " | ".join(str(alarms) for _, alarms in columns.values())
        + " |"
    )
    return "\n".join([*lines, "", f"{whole} of {len(FAULTS)} faults found wherever planted"])


def costs(model_dir: Path, pushes: int) -> Iterator[str]:
    """Yield, for each engine and number format, false alarms and seconds on a real model."""
    yield "| engine | valid pushes | false alarms | push s | without checksums s | log-probs s |"
    yield "|---|---|---|---|---|---|"
    for setup in SETUPS[:4]:
        policy, engine = Policy(model_dir, setup), start(model_dir, setup)
        alarms, seconds, plain, answers = 0, [], [], []
        probe = probe_of(PROMPT)
        rounding = None
        for i in range(pushes):
            policy.step(i)
            began = time.perf_counter()
            try:
                push(engine, pushed_weights(policy.model), version=i + 1)
                seconds.append(time.perf_counter() - began)
                began = time.perf_counter()
                logprobs = probe_logprobs(policy.scored, probe)
                if rounding is None:
                    rounding = measured_rounding(policy.scored, probe, logprobs)
                    began = time.perf_counter()
                check_answers(engine, probe, logprobs=logprobs, rounding=rounding)
                answers.append(time.perf_counter() - began)
            except TrainingError as error:
                sys.stderr.write(f"false alarm: {error}\n")
                alarms += 1
            if i % 5 == 0:
                with no_checksums():
                    began = time.perf_counter()
                    engine.load_weights(pushed_weights(policy.model), version=i + 1)
                    plain.append(time.perf_counter() - began)
        engine.close()
        numbers = " | ".join(f"{statistics.median(x):.3f}" for x in (seconds, plain, answers))
        yield f"| {setup.title} | {pushes} | {alarms} | {numbers} |"


@contextlib.contextmanager
def no_checksums() -> Iterator[None]:
    """Skip checksums inside the block, to measure their cost."""
    from unittest import mock

    def nothing(tensor: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.int64)

    with mock.patch("align.sampling.hf.checksum", nothing):
        if "align.sampling.vllm_push" not in sys.modules:
            yield
            return
        with mock.patch("align.sampling.vllm_push.checksum", nothing):
            yield


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pushes", type=int, default=50, help="valid pushes of each set-up")
    parser.add_argument("--model", type=Path, help="a model folder: measure valid pushes on it")
    args = parser.parse_args()
    if args.model is None:
        sys.stdout.write(table(args.pushes) + "\n")
    else:
        for line in costs(args.model, args.pushes):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    sys.stdout.flush()
    os._exit(0)  # vLLM's own end takes seconds


if __name__ == "__main__":
    main()
