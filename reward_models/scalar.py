"""The learned scorer: a decoder or an encoder with one or several scalar heads, and its files.

For a decoder, index t of the values refers to the text up to and including token t. The score of a
response is the value at its last real token, including the stop token, as in training. This
position comes from lengths or the attention mask, never from comparing ids with the pad id.

An encoder attends to the whole text from every position. Its score is read from its first token,
[CLS], and every index of the values contains that number, so the last of them is the score here
too.
"""

import copy
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from reward_models.classifier_files import (
    BACKBONE,
    classifier_class,
    classifier_config,
    padding_id,
    read_weights,
    saved_name,
    weights_files,
)
from reward_models.paired import token_types

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

WEIGHTS_FILE = "model.safetensors"
SCORER_FILE = "scorer.json"
STOPS = "stop_token_ids"
"""Key of scorer.json: the tokens that end a response, if the stage knew them."""
Reads = Literal["last", "first"]
"""The token from which a score is read: the last one of a decoder, the first one of an encoder."""


class ScalarHead(nn.Linear):
    """Map each hidden state to one number per head, in float32 for any dtype of the weights.

    Reference: "The N Implementation Details of RLHF with PPO": weights ~ N(0, 1 / sqrt(d + 1))
        for a hidden size d.
    """

    def __init__(
        self, hidden_size: int, num_heads: int = 1, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(hidden_size, num_heads, bias=False)
        std = 1.0 / math.sqrt(hidden_size + 1)
        with torch.no_grad():
            self.weight.normal_(0.0, std, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return float32 values per position: (B, T, D) -> (B, T), or (B, T, K) for K > 1 heads."""
        values = nn.functional.linear(hidden.float(), self.weight.float())
        return values.squeeze(-1) if self.out_features == 1 else values


class RewardModel(nn.Module):
    """Compute a scalar value for every token of a text.

    Args:
        backbone: a transformers decoder without its language-model head (``AutoModel``), or an
            encoder without its pooler.
        hidden_size: width of the backbone's last hidden state.
        num_heads: number of heads on the backbone; several heads form an ensemble.
        reads: ``first`` for an encoder.
        separator: the token after which an encoder's token types are 1; None without token types.
        generator: random generator of the heads' initial weights.

    Attributes:
        mean: mean score on reference samples, one per head; a float32 buffer, saved in scorer.json.
        std: standard deviation of the same scores; set both with `set_normalization`.
        extra: other keys of scorer.json, such as how the scorer was supervised.
    """

    mean: Tensor
    std: Tensor

    backbone: Any
    """A model of transformers, which peft may have wrapped."""
    passes: Callable[[int], int] | None = None
    """Maps a process's number of passes to that of all which share the weights; None if none do."""

    def __init__(
        self,
        backbone: nn.Module,
        hidden_size: int,
        *,
        num_heads: int = 1,
        reads: Reads = "last",
        separator: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.reads: Reads = reads
        self.separator = separator
        self.head = ScalarHead(hidden_size, num_heads, generator=generator)
        self.extra: dict[str, Any] = {}
        shape = (num_heads,) if num_heads > 1 else ()
        self.register_buffer("mean", torch.zeros(shape), persistent=False)
        self.register_buffer("std", torch.ones(shape), persistent=False)

    @property
    def num_heads(self) -> int:
        """Return the number of heads."""
        return self.head.out_features

    @property
    def config(self) -> Any:
        """Return the backbone's configuration."""
        return self.backbone.config

    @property
    def max_tokens(self) -> int | None:
        """Return the largest number of tokens for which the backbone has positions, or None."""
        return max_tokens(self.backbone)

    def gradient_checkpointing_enable(self, **kwargs: object) -> None:
        """Trade compute for memory in the backbone; arguments are those of transformers."""
        backbone: Any = self.backbone
        backbone.gradient_checkpointing_enable(**kwargs)

    def set_normalization(
        self, *, mean: float | Sequence[float], std: float | Sequence[float]
    ) -> None:
        """Store the mean and standard deviation of the raw scores on reference samples.

        With several heads, both have one number per head.

        Raises:
            ValueError: a number is not finite, ``std`` is not above 0, or their count is wrong.
        """
        means, stds = torch.tensor(mean), torch.tensor(std)
        if not (means.isfinite().all() and stds.isfinite().all() and (stds > 0.0).all()):
            raise ValueError(f"scorer mean {mean}, std {std}: need finite numbers and std > 0")
        if not means.shape == stds.shape == self.mean.shape:
            raise ValueError(f"scorer mean {mean}, std {std}: need {self.num_heads} of each")
        # Create new tensors, since DeepSpeed casts existing buffers to the training dtype.
        device = self.mean.device
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self.std = torch.tensor(std, dtype=torch.float32, device=device)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Return the raw value at every position.

        Args:
            input_ids: (B, T), or one packed row (1, N) with ``position_ids`` restarting at 0.
            position_ids: (B, T); an encoder counts positions itself.
            attention_mask: (B, T), 1 on real tokens; right padding.
            kwargs: passed to the backbone.

        Returns:
            (B, T) float32, not normalized.
        """
        if self.reads == "first":
            assert position_ids is None, "an encoder needs each text in its own row"
            return self._of_whole_texts(input_ids, attention_mask)
        output = self.backbone(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **kwargs,
        )
        return self.head(output.last_hidden_state)

    def _of_whole_texts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the value of each row's first token for all its tokens."""
        types = {}
        if self.separator is not None:
            types["token_type_ids"] = token_types(input_ids, self.separator)
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **types)
        # Only the first token's state is read; its value stands for the whole text.
        values = self.head(output.last_hidden_state[:, :1])  # (B, 1) or (B, 1, K)
        return values.expand(-1, input_ids.shape[1], *values.shape[2:])

    def save(
        self,
        directory: str | Path,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        state_dict: Mapping[str, Tensor] | None = None,
        extra: Mapping[str, Any] | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        """Save model.safetensors, config.json, scorer.json and the tokenizer's files.

        A decoder is saved as transformers' ``...ForSequenceClassification`` with one label per
        head, whose logits are the raw scores. An encoder keeps names of its own, since
        transformers' classes read encoders through further layers.

        Args:
            directory: created if missing. tokenizer: the one with which the scorer was trained.
            state_dict: weights in place of the module's own.
            extra: further keys for scorer.json.
            stop_token_ids: tokens that end a response, the one that ends plain text first; they are
                kept in scorer.json. Empty for the tokenizer's eos alone.
        """
        from safetensors.torch import save_file

        weights = self.state_dict() if state_dict is None else state_dict
        named = self.save_settings(
            directory, weights, tokenizer=tokenizer, extra=extra, stop_token_ids=stop_token_ids
        )
        tensors = {named(k): v.detach().cpu().contiguous() for k, v in weights.items()}
        # Of a larger scorer that was saved here before.
        for old in (*weights_files(directory), Path(directory) / f"{WEIGHTS_FILE}.index.json"):
            old.unlink(missing_ok=True)
        save_file(tensors, Path(directory) / WEIGHTS_FILE, metadata={"format": "pt"})

    def save_settings(
        self,
        directory: str | Path,
        names: Collection[str],
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        extra: Mapping[str, Any] | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> Callable[[str], str]:
        """Save what `save` does, without the weights.

        Args:
            directory, tokenizer, extra, stop_token_ids: see `save`.
            names: of all weights that will be saved, as in this module's state.

        Returns:
            The function of a weight's name in this module that gives its name in the files.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config, tokenizer, named = self._layout(names, tokenizer, stop_token_ids)
        config.save_pretrained(directory)
        scorer = {**self.extra, **(extra or {})}
        scorer |= {"mean": self.mean.tolist(), "std": self.std.tolist()}
        if stop_token_ids:
            scorer[STOPS] = list(stop_token_ids)
        if self.reads == "first":
            scorer |= {"reads": self.reads, "separator": self.separator}
        text = json.dumps(scorer, indent=2, sort_keys=True) + "\n"
        (directory / SCORER_FILE).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        return named

    def _layout(
        self,
        names: Collection[str],
        tokenizer: "PreTrainedTokenizerBase | None",
        stop_token_ids: Sequence[int],
    ) -> tuple[Any, "PreTrainedTokenizerBase | None", Callable[[str], str]]:
        """Return configuration, tokenizer and names of the weights as transformers has them."""
        below = {n.removeprefix(BACKBONE) for n in names if n.startswith(BACKBONE)}
        found = classifier_class(self.config, below) if self.reads == "last" else None
        if found is None:
            return self.config, tokenizer, lambda own: own
        name, prefix = found
        pad: Any = self.config.get_text_config().pad_token_id
        if tokenizer is not None:
            eos: Any = tokenizer.eos_token_id
            stops = {eos, *stop_token_ids}
            pad = padding_id(tokenizer, stops, num_rows=self.config.get_text_config().vocab_size)
            if pad is not None and pad != tokenizer.pad_token_id:
                # The caller's tokenizer keeps its padding token.
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        config = classifier_config(
            self.config, name, mean=self.mean.tolist(), std=self.std.tolist(), pad_token_id=pad
        )
        return config, tokenizer, lambda own: saved_name(own, prefix)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        attn_implementation: str | None = None,
        backbone: nn.Module | None = None,
    ) -> "RewardModel":
        """Load a scorer that `save` wrote.

        Args:
            directory: ``model/`` of a reward stage. dtype: of the weights.
            attn_implementation: attention of a decoder, default ``exact_attention``; an encoder
                uses transformers' own choice.
            backbone: the scorer's own if it is loaded already; only the heads are read then.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the weights do not fit the configuration.
        """
        directory = Path(directory)
        _check_folder(directory)
        scorer = json.loads((directory / SCORER_FILE).read_text(encoding="utf-8"))
        mean, std = scorer.pop("mean"), scorer.pop("std")
        reads, separator = scorer.pop("reads", "last"), scorer.pop("separator", None)
        is_whole = backbone is None
        if backbone is None:
            backbone = _bare(directory, dtype, attention=attn_implementation, reads=reads)
        config: Any = backbone.config
        num_heads = len(mean) if isinstance(mean, list) else 1
        width = config.get_text_config().hidden_size
        model = cls(backbone, width, num_heads=num_heads, reads=reads, separator=separator)
        model.extra = scorer
        # Cast only the head: casting the backbone again would round its rotary frequencies.
        model.head.to(dtype)
        part = model if is_whole else nn.ModuleDict({"head": model.head})
        try:
            part.load_state_dict(read_weights(directory, heads_only=not is_whole))
        except RuntimeError as error:
            raise ValueError(f"{directory}: {WEIGHTS_FILE} does not fit: {error}") from error
        model.set_normalization(mean=mean, std=std)
        return model.eval()


def _bare(directory: Path, dtype: torch.dtype, *, attention: str | None, reads: Reads) -> nn.Module:
    """Return the backbone of a scorer's configuration, with random weights."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if reads == "first":
        backbone = AutoModel.from_config(config, dtype=dtype)
        drop_pooler(backbone)
        return backbone
    attention = attention or exact_attention(config)
    return AutoModel.from_config(config, dtype=dtype, attn_implementation=attention)


def _check_folder(directory: Path) -> None:
    has = {
        SCORER_FILE: (directory / SCORER_FILE).is_file(),
        WEIGHTS_FILE: bool(weights_files(directory)),
        "config.json": (directory / "config.json").is_file(),
    }
    for name in (name for name, found in has.items() if not found):
        raise FileNotFoundError(
            f"{directory}: no {name}; expected the model folder of a reward stage"
        )


def exact_attention(config: "PreTrainedConfig") -> str | None:
    """Return the attention that exactly follows a decoder's configuration; None for any."""
    text = config.get_text_config()
    # transformers' fused attention ignores the soft cap and scales Falcon's ALiBi differently.
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    return "eager" if capped or getattr(text, "alibi", False) else None


def max_tokens(backbone: nn.Module) -> int | None:
    """Return the largest number of tokens for which a backbone has positions, or None."""
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from after its pad id.
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - before
    return getattr(backbone.config, "max_position_embeddings", None)


def drop_pooler(encoder: Any) -> None:
    """Remove the pooler of an encoder if it has one, since scores are read before it."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None


def reads_first(directory: Path) -> bool:
    """Return whether a folder contains an encoder-based scorer."""
    path = directory / SCORER_FILE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("reads") == "first"


def score_token_ids(
    model: RewardModel, rows: Sequence[Sequence[int]], *, micro_tokens: int = 16384
) -> list[float]:
    """Return the raw score of each token row, in order: the mean over the heads."""
    return [sum(s) / len(s) for s in score_heads(model, rows, micro_tokens=micro_tokens)]


def score_heads(
    model: RewardModel, rows: Sequence[Sequence[int]], *, micro_tokens: int = 16384
) -> list[list[float]]:
    """Return one raw score per head for each token row; every row ends with its response."""
    values = token_values(model, rows, micro_tokens=micro_tokens)
    return [of_row[-1].view(-1).tolist() for of_row in values]


@torch.no_grad()
def token_values(
    model: RewardModel, rows: Sequence[Sequence[int]], *, micro_tokens: int = 16384
) -> list[Tensor]:
    """Return the values of every token of each row, computed in batches of similar length.

    The module's mode (dropout) is restored afterwards.

    Args:
        model: the scorer. rows: token ids of prompt and response; at least one token each.
        micro_tokens: padded tokens of one forward pass (a longer row has its own pass).

    Returns:
        For each row (T,), or (T, K) with several heads, on CPU.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    device = model.head.weight.device
    was_training = model.training
    model.eval()
    plan = _plan(rows, micro_tokens)
    # Before the first pass: from then on, processes must gather the same weights in turn.
    extra = 0 if model.passes is None else model.passes(len(plan)) - len(plan)
    for batch in plan:
        # Pad on the right to the longest row of the batch.
        lengths = torch.tensor([len(rows[i]) for i in batch])
        width = int(lengths.max())
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(rows[i])] = torch.tensor(rows[i], dtype=torch.long)
        mask = torch.arange(width).unsqueeze(0) < lengths.unsqueeze(1)  # (B, T)
        values = model(ids.to(device), attention_mask=mask.long().to(device)).cpu()
        for row, i in enumerate(batch):
            found[i] = values[row, : len(rows[i])]
    for _ in range(extra):
        one = torch.zeros(1, 1, dtype=torch.long, device=device)
        model(one, attention_mask=torch.ones_like(one))
    model.train(was_training)
    return found


def _plan(rows: Sequence[Sequence[int]], micro_tokens: int) -> list[list[int]]:
    """Return the rows of each pass, the shortest first: as many as fit, and at least one."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    plan: list[list[int]] = []
    for i in order:
        if plan and len(rows[i]) * (len(plan[-1]) + 1) <= micro_tokens:
            plan[-1].append(i)
        else:
            plan.append([i])
    return plan
