"""The cases of ``benchmarks.not_learning``: tiny stages with a planted cause, and healthy ones."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

LETTERS, STEPS = "abcdefghijklmnopqrstuvwxyz", 16
Plant = Callable[[], AbstractContextManager[Any]]
REWARDS = """
def small(completions, **kwargs):
    return [sum(c < "n" for c in text) / max(len(text), 1) for text in completions]

def saturated(completions, **kwargs):
    return [1.0 - 1e-6 * (1.0 - x) for x in small(completions)]

def one(completions, **kwargs):
    return [0.7 for _ in completions]

def of_prompt(prompts, completions, **kwargs):
    return [float(len(prompt) % 2) for prompt in prompts]

def whole(completions, completion_ids, **kwargs):
    return [float(len(ids) > 3 and ids[0] < 16) for ids in completion_ids]

def broken(completions, **kwargs):
    return [None if i % 32 else x for i, x in enumerate(small(completions))]
"""


MODELS = ("base", "wordy", "endless", "peaked")


def write_model(folder: Path, name: str) -> None:
    """Write a random Qwen2 of hidden size 32 with a tokenizer of letters.

    ``base`` samples the stop token with a probability of about 0.15, ``wordy`` 0.003, ``endless``
    1e-10; ``peaked`` always samples the same letters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.15,
        eos_token_id=1,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        # One coordinate is the same in every state, and the stop token's row of the head reads it.
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[1] = 0.0
        model.lm_head.weight[1, 0] = {"endless": -5.0, "wordy": -0.5}.get(name, 0.3)
        if name == "peaked":
            model.lm_head.weight *= 1000.0
    model.save_pretrained(folder)
    symbols = ["<s>", "</s>", "<pad>", *LETTERS]
    letters = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Write the data files: good responses have letters of the first half; and faulty rows."""
    draw = random.Random(0)

    def word(letters: str) -> str:
        return "".join(draw.choices(letters, k=draw.randint(2, 6)))

    prompts = [word(LETTERS) for _ in range(64)]
    pairs = [
        {"prompt": p, "chosen": word(LETTERS[:13]), "rejected": word(LETTERS[13:])} for p in prompts
    ]
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    judged = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    unknown = {"chosen": "\u00e4", "rejected": "\u00f6"}
    files = {
        "prompts": [{"prompt": p} for p in prompts],
        "pairs": pairs,
        "sft": sft,
        "judged": judged,
        "repeated": [sft[0]] * 64,
        # Other texts, but of a letter that the tokenizer does not have: the same tokens.
        "same": [row | {k: row["chosen"] + x for k, x in unknown.items()} for row in pairs],
        "good": [row for row in judged if row["label"]],
        "classes": [{"text": row["completion"], "label": str(row["label"])} for row in judged],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "rewards.py").write_text(REWARDS)


DATA = {"sft": "sft", "dpo": "pairs", "reward": "pairs", "kto": "judged", "classify": "classes"}
MEASURES = {"ppo": "reward/mean", "grpo": "reward/mean"}


@dataclass(frozen=True, slots=True)
class Case:
    """A stage with what is planted in it.

    Attributes:
        cause: name of the alarm, or a part of the error; empty for a healthy run.
        data: data file or function of ``REWARDS``; None takes the usual one.
        changes: keys of the stage. plants: patches of the running code.
        init: the model.
    """

    title: str
    kind: str
    cause: str = ""
    data: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    plants: tuple[Plant, ...] = ()
    init: str = "base"

    @property
    def name(self) -> str:
        """Return the kind of the stage and the title."""
        return f"{self.kind}: {self.title}"

    @property
    def measure(self) -> str:
        """Return the metric that shows whether the run learns."""
        return MEASURES.get(self.kind, "train/loss")

    def stage(self, folder: Path) -> dict[str, Any]:
        """Return the stage of the recipe."""
        rate = {"learning_rate": 3e-3, "schedule": "constant", "warmup_frac": 0.0}
        changes = dict(self.changes)
        stage: dict[str, Any] = {
            "kind": self.kind,
            "init": str(folder / self.init),
            "steps": STEPS,
            "max_length": 32,
            "micro_tokens": 1024,
            "optim": rate | changes.pop("optim", {}),
        }
        if self.kind in ("ppo", "grpo"):
            sampling = {"max_new_tokens": 12, "engine": "hf"} | changes.pop("sampling", {})
            reward = {"kind": "python", "path": f"{folder}/rewards.py:{self.data or 'small'}"}
            stage |= {"prompts": [{"path": f"{folder}/prompts.jsonl"}], "rewards": [reward]}
            stage |= {"sampling": sampling, "prompts_per_step": 8}
            stage |= {"group_size": 4} if self.kind == "grpo" else {"prompts_per_step": 32}
        else:
            path = f"{folder}/{self.data or DATA[self.kind]}.jsonl"
            stage |= {"data": [{"path": path}], "batch_size": 16}
            stage |= {"norm_prompts": 0} if self.kind == "reward" else {}
        return stage | changes


def patch(target: str, new: Any) -> Plant:
    """Return a plant that replaces an attribute."""
    return lambda: mock.patch(target, new)


def _ends_early(optim: Any, step: int, total_steps: int) -> float:
    return optim.learning_rate if step < 4 else 0.0


@contextmanager
def _adapter_of_zeros() -> Iterator[None]:
    from align.stages import offline

    build = offline.build_policy

    def zeroed(*args: Any, **options: Any) -> Any:
        module = build(*args, **options)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.zero_()
        return module

    with mock.patch("align.stages.sft.build_policy", zeroed):
        yield


@contextmanager
def _detached_loss() -> Iterator[None]:
    from align.stages import sft

    def loss(model: Any, batch: Any, **options: Any) -> Any:
        found, stats = whole(model, batch, **options)
        return found.detach() + 0.0 * next(model.parameters()).sum(), stats

    whole = sft.sft_loss
    with mock.patch("align.stages.sft.sft_loss", loss):
        yield


@contextmanager
def _nan_gradient() -> Iterator[None]:
    from align.stages import sft

    def loss(model: Any, batch: Any, **options: Any) -> Any:
        found, stats = whole(model, batch, **options)
        if found.requires_grad:
            found.register_hook(lambda gradient: gradient * float("nan"))
        return found, stats

    whole = sft.sft_loss
    with mock.patch("align.stages.sft.sft_loss", loss):
        yield


@contextmanager
def _unweighted_mask() -> Iterator[None]:
    """Untrain every token after the preflight has seen the rows."""
    from dataclasses import replace

    from align.stages import offline

    train = offline.run_offline

    def masked(module: Any, task: Any, *args: Any, **options: Any) -> Any:
        rows = [replace(row, trained=(False,) * len(row.trained)) for row in task.rows]
        return train(module, replace(task, rows=rows), *args, **options)

    with mock.patch("align.stages.offline.run_offline", masked):
        yield


@contextmanager
def _drifting_sampler() -> Iterator[None]:
    """Report other probabilities than those sampled from, after the preflight."""
    from dataclasses import replace

    from align.online import loop

    sample = loop.sample_groups

    def drifted(*args: Any, **options: Any) -> Any:
        return [
            [replace(c, logprobs=tuple(x - 1.5 for x in c.logprobs)) for c in group]
            for group in sample(*args, **options)
        ]

    with mock.patch("align.online.loop.sample_groups", drifted):
        yield


def _policy_as_reference(spec: Any, module: Any, model_dir: Path) -> Any:
    return type(module)(module.model)


KL = {"coef": 1000.0, "place": "loss", "estimator": "k3"}
LORA = {"method": "lora", "rank": 4, "alpha": 8}
LIGHT_KL = {"coef": 0.02, "place": "loss", "estimator": "k3"}
CAUSES = (
    Case(
        "learning rate 1e-12", "sft", "learning_rate", changes={"optim": {"learning_rate": 1e-12}}
    ),
    Case(
        "schedule that ends after 4 of 16 steps",
        "sft",
        "learning_rate",
        plants=(patch("align.training.learner.learning_rate", _ends_early),),
    ),
    Case("warm-up as long as the run", "sft", "warmup", changes={"optim": {"warmup_frac": 1.0}}),
    Case(
        "optimizer without the weights",
        "sft",
        "frozen_weights",
        plants=(patch("torch.optim.AdamW.step", mock.Mock(return_value=None)),),
    ),
    Case(
        "adapter of zeros",
        "sft",
        "zero_adapter",
        changes={"tuning": LORA},
        plants=(_adapter_of_zeros,),
    ),
    Case("loss without a graph", "sft", "zero_gradient", plants=(_detached_loss,)),
    Case("gradient of NaN", "sft", "gradient norm is nan", plants=(_nan_gradient,)),
    Case("mask emptied after the preflight", "sft", "empty_mask", plants=(_unweighted_mask,)),
    Case("one row 64 times", "sft", "one_row", data="repeated"),
    Case("Adam's eps of 10", "sft", "adam_epsilon", changes={"optim": {"eps": 10.0}}),
    Case(
        "gradient clipped to 1e-9",
        "sft",
        "clipped_gradient",
        changes={"optim": {"max_grad_norm": 1e-9}},
    ),
    Case("learning rate 10", "sft", "diverged", changes={"optim": {"learning_rate": 10.0}}),
    Case("chosen equals rejected", "dpo", "the same tokens", data="same"),
    Case("chosen equals rejected", "reward", "the same tokens", data="same"),
    Case("beta 1e-7", "dpo", "beta", changes={"beta": 1e-7}),
    Case("beta 300", "dpo", "beta", changes={"beta": 300.0, "optim": {"learning_rate": 1e-4}}),
    Case("only good responses", "kto", "one_class", data="good"),
    Case(
        "critic warm-up as long as the run",
        "ppo",
        "leaves none of the 16 steps",
        changes={"critic": {"warmup_steps": STEPS}},
    ),
    Case("constant reward", "ppo", "constant_reward", data="one"),
    Case("constant reward", "grpo", "constant_reward", data="one"),
    Case("reward depends on the prompt alone", "grpo", "dead_groups", data="of_prompt"),
    Case("saturated reward model", "grpo", "saturated_reward", data="saturated"),
    Case("31 of 32 responses cannot be scored", "grpo", "invalid_rewards", data="broken"),
    Case(
        "limit of 2 tokens, for answers of 4",
        "grpo",
        "truncated",
        data="whole",
        changes={"sampling": {"max_new_tokens": 2}},
        init="wordy",
    ),
    Case(
        "stop token never sampled, which the reward needs",
        "grpo",
        "truncated",
        changes={"truncated_score": 0.0},
        init="endless",
    ),
    Case("policy without entropy", "grpo", "entropy_collapse", init="peaked"),
    Case("sampler off by 1.5 nats", "grpo", "sampler_drift", plants=(_drifting_sampler,)),
    Case(
        "clip range 1e-6, 4 epochs",
        "grpo",
        "clipped_ratios",
        changes={
            "clip": {"low": 1e-6, "high": 1e-6},
            "update_epochs": 4,
            "optim": {"learning_rate": 1e-5},
        },
    ),
    Case("KL coefficient 1000 in the loss", "grpo", "kl_dominates", changes={"kl": KL}),
    Case(
        "KL coefficient 100 in the reward",
        "ppo",
        "kl_dominates",
        changes={"kl": {"coef": 100.0}},
    ),
    Case(
        "policy as its own reference",
        "grpo",
        "reference_moves",
        changes={"kl": LIGHT_KL},
        plants=(patch("align.stages.online.build_reference", _policy_as_reference),),
    ),
)
HEALTHY = (
    *(Case(f"seed {s}", "sft", changes={"seed": s}) for s in (1, 2)),
    Case("lora", "sft", changes={"tuning": LORA}),
    Case("bfloat16", "sft", changes={"dtype": "bfloat16"}),
    Case(
        "cosine, warm-up 0.1", "sft", changes={"optim": {"schedule": "cosine", "warmup_frac": 0.1}}
    ),
    Case("sigmoid", "dpo"),
    Case("hinge, lora", "dpo", changes={"loss": "hinge", "tuning": LORA}),
    Case("ipo", "dpo", changes={"loss": "ipo"}),
    Case("simpo", "dpo", changes={"loss": "simpo", "beta": 2.0}),
    *(Case(f"seed {s}", "kto", changes={"seed": s}) for s in (1, 2)),
    Case("pairs", "reward"),
    Case("two classes", "classify"),
    *(Case(f"seed {s}", "ppo", changes={"seed": s}) for s in (1, 2)),
    *(Case(f"seed {s}", "grpo", changes={"seed": s}) for s in (1, 2)),
    Case("KL in the loss, lora", "grpo", changes={"kl": LIGHT_KL, "tuning": LORA}),
    *(
        Case(name, "grpo", changes={"algorithm": name})
        for name in ("rloo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce++")
    ),
)
SHORT = (
    "sft: learning rate 1e-12",
    "sft: adapter of zeros",
    "dpo: beta 1e-7",
    "kto: only good responses",
    "grpo: constant reward",
    "grpo: limit of 2 tokens, for answers of 4",
    "sft: bfloat16",
    "dpo: hinge, lora",
    "kto: seed 1",
    "grpo: seed 1",
)
"""Names of the cases that the tests run."""
