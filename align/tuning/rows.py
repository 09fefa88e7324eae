"""Train the rows of single tokens beside an adapter, which leaves the embeddings frozen.

The markers around turns and the stop token may be new to a model, or reserved and never trained. A
frozen row of such a token stays what it is: the model cannot tell the markers apart, and never
stops.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from align.core.errors import RecipeError
from align.models.loading import load_tokenizer, stop_token_ids
from align.recipe.schema.tuning import TuningSpec
from align.tuning.export import full_tensor
from reward_models.limits import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEAR_MEAN = 0.01
"""A row is untrained if its distance to its initial value, the mean, is below this fraction."""
NEAR_ZERO = 1e-3
"""A row is untrained if its norm is below this fraction of the median norm."""
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def untrained_tokens(model: "PreTrainedModel", model_dir: Path | str) -> dict[int, str]:
    """Return the turn markers and the stop token whose rows nothing has trained, with the reason.

    Every rank must call this: under ZeRO-3 the tables are gathered.

    Args:
        model: a language model, or one without its head.
        model_dir: its folder, with the tokenizer.
    """
    tokenizer, stops = load_tokenizer(model_dir), stop_token_ids(model_dir)[:1]
    head = cast("nn.Module | None", model.get_output_embeddings())
    table = full_tensor(cast("nn.Embedding", model.get_input_embeddings()).weight)
    found = _untrained(table, _markers(tokenizer, stops), tokenizer.all_special_ids)
    # The head has to score the stop token; the markers around turns are only read.
    if head is not None and head.weight is not cast("Any", model).get_input_embeddings().weight:
        found |= _untrained(full_tensor(cast("Any", head).weight), stops, tokenizer.all_special_ids)
    return found


def _markers(tokenizer: "PreTrainedTokenizerBase", stops: Sequence[int]) -> list[int]:
    """Return the added tokens that a conversation contains, and the stop token."""
    if not tokenizer.chat_template or not stops:
        return list(stops)
    try:
        ids = render_chat(tokenizer, _PROBE, tokenize=True, return_dict=False)
    except Exception:  # a template may fail anyhow; a stage that renders conversations reports it
        return list(stops)
    known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return sorted({*stops, *(i for i in ids if i in known)})


@torch.no_grad()
def _untrained(table: Tensor, ids: Sequence[int], special: Sequence[int]) -> dict[int, str]:
    """Return those of ``ids`` whose rows of ``table`` (V, H) are initial values, and which ones."""
    ids = [i for i in ids if 0 <= i < len(table)]
    found: dict[int, str] = {}
    usual = table.float().norm(dim=1).median() if ids else table.new_zeros(())
    means = list(_means(table, sorted({*ids, *special}))) if ids else []
    for token in ids:
        row = table[token].float()
        if row.norm() <= NEAR_ZERO * usual:
            found[token] = "zero"
        elif int((table == table[token]).all(1).sum()) > 1:
            found[token] = "equal to that of another token"
        # New rows are set to the mean of the rows before the first new one. Which one that was is
        # not recorded, so each special token up to this one is tried.
        elif any(
            first <= token and (row - mean).norm() <= NEAR_MEAN * mean.norm()
            for first, mean in means
        ):
            found[token] = "the mean of the others"
    return found


def _means(table: Tensor, firsts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the mean of the rows before each of these, without a copy of the table in float32."""
    total = torch.zeros(table.shape[1], device=table.device)
    for begin, end in pairwise([0, *(i for i in firsts if 0 < i < len(table))]):
        total = total + table[begin:end].sum(0, dtype=torch.float32)
        yield end, total / end


def trainable_rows(
    model: "PreTrainedModel", tokens: Sequence[int], tuning: TuningSpec
) -> dict[str, list[int]] | None:
    """Return peft's ``trainable_token_indices``: these rows of the embeddings and of their head.

    Raises:
        RecipeError: the rows cannot be trained apart from their tables.
    """
    tables = {"embeddings": cast("nn.Module", model.get_input_embeddings())}
    if (head := cast("nn.Module | None", model.get_output_embeddings())) is not None:
        tables["head"] = head
    for what, table in tables.items():
        # Adapters are added to whole weights, which ZeRO-3 shards afterwards.
        odd = not isinstance(table, nn.Embedding | nn.Linear) or hasattr(table.weight, "ds_id")
        if odd or getattr(table, "bias", None) is not None:
            raise RecipeError(
                f"tuning.method {tuning.method}: the rows of single tokens cannot be trained in "
                f"the {what} of {type(model).__name__}, which has a bias, is not a plain table, or "
                "was loaded in shards. Train with method full first"
            )
    # A tied head follows the embeddings.
    own = {id(table.weight): table for table in reversed(tables.values())}.values()
    return {name: list(tokens) for name, m in model.named_modules() if any(m is x for x in own)}


def trained_rows(model: nn.Module) -> list[int]:
    """Return the tokens whose rows are trained beside a model's adapter."""
    adapters: list[Any] = [m.token_adapter for m in model.modules() if hasattr(m, "token_adapter")]
    return sorted({i for a in adapters for ids in a.token_indices.values() for i in ids})


def refuse_untrained(found: Mapping[int, str], model_dir: Path | str, who: str) -> None:
    """Raise if there are untrained tokens, for methods that cannot train their rows.

    Raises:
        RecipeError: names the tokens.
    """
    if not found:
        return
    names = load_tokenizer(model_dir).convert_ids_to_tokens(list(found))
    rows = ", ".join(f"{name!r} ({why})" for name, why in zip(names, found.values(), strict=True))
    raise RecipeError(
        f"{who}: nothing has trained the rows of {rows} in the embeddings of {model_dir}, and they "
        "would be frozen: the model could not tell the tokens apart, or never stop. Train with "
        "method lora or full in a stage of kind sft first, which train these rows too, or use a "
        "template and a stop token that the model knows "
        "(stages.<base>.tokenizer: {chat_template: plain, stop_token: TOKEN})"
    )
