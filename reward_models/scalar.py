"""The learned scorer: a decoder with a scalar head, its files, and the reward that calls it.

Index t of the values speaks of the text up to and including token t; the score of an answer is
the value at its last real token, the stop token included, as in training. That position comes
from lengths or the attention mask, never from comparing ids with the pad id.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reward_models.base import Text, check_rows, column_values, completion_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS_FILE = "model.safetensors"
SCORER_FILE = "scorer.json"


class ScalarHead(nn.Linear):
    """Map each hidden state to one number, computed in float32 whatever the weights' dtype.

    Reference: "The N Implementation Details of RLHF with PPO": weights ~ N(0, 1 / sqrt(d + 1))
        for a hidden size d.
    """

    def __init__(self, hidden_size: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(hidden_size, 1, bias=False)
        std = 1.0 / math.sqrt(hidden_size + 1)
        with torch.no_grad():
            self.weight.normal_(0.0, std, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """Give one float32 value per position: (B, T, D) -> (B, T)."""
        return nn.functional.linear(hidden.float(), self.weight.float()).squeeze(-1)


class RewardModel(nn.Module):
    """Give every token of a text a scalar value.

    Args:
        backbone: a transformers decoder without its language-model head (``AutoModel``).
        hidden_size: width of the backbone's last hidden state.
        generator: source of the head's random initial weights.

    Attributes:
        mean: mean score on reference samples; a float32 buffer, kept in scorer.json.
        std: standard deviation of the same; set both with `set_normalisation`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        hidden_size: int,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ScalarHead(hidden_size, generator=generator)
        self.register_buffer("mean", torch.tensor(0.0), persistent=False)
        self.register_buffer("std", torch.tensor(1.0), persistent=False)

    @property
    def config(self) -> Any:
        """Give the backbone's configuration."""
        return self.backbone.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Trade compute for memory in the backbone; arguments are those of transformers."""
        self.backbone.gradient_checkpointing_enable(**kwargs)

    def set_normalisation(self, *, mean: float, std: float) -> None:
        """Keep the mean and standard deviation of the raw scores on reference samples.

        Raises:
            ValueError: if a number is not finite or ``std`` is not above 0.
        """
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0.0):
            raise ValueError(f"scorer mean {mean}, std {std}: need finite numbers and std > 0")
        # New tensors: DeepSpeed casts the buffers that it finds to the training dtype.
        device = self.mean.device
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(std, dtype=torch.float32, device=device)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Give the raw value at every position.

        Args:
            input_ids: (B, T), or one packed row (1, N) with ``position_ids`` restarting at 0.
            position_ids: (B, T).
            attention_mask: (B, T), 1 on real tokens; right padding.
            kwargs: handed to the backbone.

        Returns:
            (B, T) float32, not normalised.
        """
        output = self.backbone(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **kwargs,
        )
        return self.head(output.last_hidden_state)

    def save(
        self,
        directory: str | Path,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        state_dict: Mapping[str, Tensor] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write model.safetensors, config.json, scorer.json and the tokenizer's files.

        Args:
            directory: made if missing.
            tokenizer: the one the scorer was trained with.
            state_dict: full weights where the module's own are sharded (ZeRO-3).
            extra: further keys for scorer.json.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        self.config.save_pretrained(directory)
        scorer = {**(extra or {}), "mean": float(self.mean), "std": float(self.std)}
        text = json.dumps(scorer, indent=2, sort_keys=True) + "\n"
        (directory / SCORER_FILE).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        attn_implementation: str | None = None,
    ) -> "RewardModel":
        """Read a scorer that `save` wrote.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if the weights do not fit the configuration.
        """
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModel

        directory = Path(directory)
        for name in (SCORER_FILE, WEIGHTS_FILE, "config.json"):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"{directory}: no {name}; expected the model folder of a reward stage"
                )
        scorer = json.loads((directory / SCORER_FILE).read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(directory)
        backbone = AutoModel.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
        model = cls(backbone, config.get_text_config().hidden_size)
        # The head alone: casting the backbone again would round its rotary frequencies.
        model.head.to(dtype)
        try:
            model.load_state_dict(load_file(directory / WEIGHTS_FILE))
        except RuntimeError as error:
            raise ValueError(f"{directory}: {WEIGHTS_FILE} does not fit: {error}") from error
        model.set_normalisation(mean=scorer["mean"], std=scorer["std"])
        return model.eval()


def last_values(values: Tensor, lengths: Tensor) -> Tensor:
    """Give the value at the last real token of each right-padded row: (B, T) -> (B,)."""
    return values.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)


@torch.no_grad()
def score_token_ids(
    model: RewardModel, rows: Sequence[Sequence[int]], *, micro_tokens: int = 16384
) -> list[float]:
    """Score token rows, each ending as its answer ends, in batches of similar length.

    The module's mode (dropout) is put back afterwards.

    Args:
        model: the scorer.
        rows: token ids of prompt and answer; at least one token each.
        micro_tokens: padded tokens of one forward pass (a longer row goes alone).

    Returns:
        Raw scores, in the order of ``rows``.
    """
    scores = [0.0] * len(rows)
    device = model.head.weight.device
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    while order:
        size = 1
        while size < len(order) and len(rows[order[size]]) * (size + 1) <= micro_tokens:
            size += 1
        batch, order = order[:size], order[size:]
        lengths = torch.tensor([len(rows[i]) for i in batch])
        width = int(lengths.max())
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(rows[i])] = torch.tensor(rows[i], dtype=torch.long)
        mask = torch.arange(width).unsqueeze(0) < lengths.unsqueeze(1)  # (B, T)
        values = model(ids.to(device), attention_mask=mask.long().to(device))
        for i, score in zip(batch, last_values(values, lengths.to(device)).tolist(), strict=True):
            scores[i] = score
    model.train(was_training)
    return scores


class ScalarReward:
    """Score answers with a trained reward model.

    With the columns ``prompt_ids`` and ``completion_ids`` (token ids of this scorer's vocabulary,
    see `shares_vocabulary`) exactly those ids are scored: the suite passes what was sampled.
    Without ``prompt_ids``, as inside a TRL trainer, the texts are rendered with the tokenizer.

    A score that is not finite is invalid.
    """

    def __init__(
        self,
        model: RewardModel,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        normalise: bool = True,
        name: str = "scalar",
        weight: float = 1.0,
        micro_tokens: int = 16384,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"reward '{name}': its tokenizer has no eos token to end an answer")
        self.model = model
        self.tokenizer = tokenizer
        self.normalise = normalise
        self.name = name
        self.__name__ = name
        self.weight = weight
        self.micro_tokens = micro_tokens
        self.invalid: Counter[str] = Counter()

    def shares_vocabulary(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Tell whether token ids of another tokenizer mean the same to this scorer."""
        return self.tokenizer.get_vocab() == tokenizer.get_vocab()

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """Score each answer; (score - mean) / std where the reward normalises."""
        check_rows(prompts, completions, reward=self.name)
        rows = self._rows(prompts, completions, columns)
        raw = score_token_ids(self.model, rows, micro_tokens=self.micro_tokens)
        mean, std = (float(self.model.mean), float(self.model.std)) if self.normalise else (0, 1)
        self.invalid.update("score is not finite" for score in raw if not math.isfinite(score))
        return [(score - mean) / std if math.isfinite(score) else None for score in raw]

    def _rows(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Any],
    ) -> list[list[int]]:
        if "prompt_ids" not in columns:
            pairs = zip(prompts, completions, strict=True)
            return [self._render(prompt, completion) for prompt, completion in pairs]
        heads, answers = (
            column_values(columns, column, reward=self.name, num_rows=len(completions))
            for column in ("prompt_ids", "completion_ids")
        )
        rows = [[*head, *answer] for head, answer in zip(heads, answers, strict=True)]
        highest = max((max(row, default=-1) for row in rows), default=-1)
        vocab_size = self.model.config.get_text_config().vocab_size
        if highest >= vocab_size:
            raise ValueError(
                f"reward '{self.name}': token id {highest} but the scorer knows {vocab_size}; the "
                "ids come from another tokenizer"
            )
        return rows

    def _render(self, prompt: Text, completion: Text) -> list[int]:
        """Tokenise prompt and answer apart, the answer up to and with its stop token."""
        if isinstance(prompt, str) and isinstance(completion, str):
            head, answer = self._plain(prompt), self._plain(completion)
            bos = self.tokenizer.bos_token_id
            if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] != head[:1]:
                head = [bos, *head]
        else:
            head, answer = self._render_turns(prompt, completion)
        eos = self.tokenizer.eos_token_id
        cut = answer.index(eos) if eos in answer else len(answer)
        return [*head, *answer[:cut], eos]

    def _render_turns(self, prompt: Text, completion: Text) -> tuple[list[int], list[int]]:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        answer = [{"role": "assistant", "content": completion_text(completion)}]
        before = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        full = self.tokenizer.apply_chat_template(turns + answer, tokenize=False)
        if not full.startswith(before):
            raise ValueError(
                f"reward '{self.name}': the chat template rewrites earlier turns; use a template "
                "that only appends"
            )
        return self._plain(before), self._plain(full[len(before) :].rstrip())

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def build_scalar(
    spec: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, device: str | None = None
) -> ScalarReward:
    """Load the scorer of a spec's ``model`` folder onto the accelerator if there is one."""
    from transformers import AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return ScalarReward(
        RewardModel.load(spec["model"], dtype).to(device),
        AutoTokenizer.from_pretrained(spec["model"]),
        normalise=spec.get("normalise", True),
        name=spec.get("name") or "scalar",
        weight=spec.get("weight", 1.0),
    )
