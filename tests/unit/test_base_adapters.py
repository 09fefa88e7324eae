"""Adapters that add tokens or change tables of the vocabulary are merged as peft runs them."""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from test_base_tokens import bring_in, saved_model

from align.core.errors import ArtifactError
from align.recipe.schema import TokenizerSpec

PLAIN = TokenizerSpec(pad_token="<pad>", chat_template="plain")
NEW = ["<call>", "</call>", "<result>"]


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    return model.eval()(torch.tensor([ids])).logits[0]  # (T, V)


def tuned_adapter(
    base: Path, folder: Path, *, new: list[str], **options: Any
) -> tuple[list[int], Tensor]:
    """Save an adapter whose training added tokens; return ids and the logits of peft's model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": new})
    if new:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    added = tokenizer.convert_tokens_to_ids(new) or [7]
    if options.pop("rows", False):
        options["trainable_token_indices"] = added
    options.setdefault("target_modules", ["q_proj"])
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    ids = [5, 6, 7, *added]
    return ids, logits(tuned, ids)


OPTIONS = [
    {},  # peft saves a table that was enlarged, although it is not trained
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"rows": True},
]
ON_A_TABLE = {
    "head": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings": {"target_modules": ["q_proj", "lm_head"]},
}
"""Adapters on one of the two tables, of which peft saves only that one."""


@pytest.mark.parametrize(
    ("options", "new", "tied"),
    [
        *((o, new, tied) for o in OPTIONS for new in (NEW, []) for tied in (True, False)),
        *((o, [], tied) for o in ON_A_TABLE.values() for tied in (True, False)),
        *((o, NEW, True) for o in ON_A_TABLE.values()),
    ],
)
def test_a_merged_adapter_computes_what_peft_computes(
    options: dict[str, Any], new: list[str], tied: bool, tmp_path: Path
) -> None:
    base = saved_model(tmp_path / "in", tied=tied)
    ids, expected = tuned_adapter(base, tmp_path / "adapter", new=new, **options)
    model_dir, _ = bring_in(tmp_path / "adapter", tmp_path, PLAIN)
    found = logits(AutoModelForCausalLM.from_pretrained(model_dir), ids)
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=1e-4, rtol=1e-4)
    # The tie that is saved is the one that the weights have: other programs go by it.
    merged = AutoModelForCausalLM.from_pretrained(model_dir)
    one = torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert json.loads((model_dir / "config.json").read_text())["tie_word_embeddings"] is one


def test_new_rows_without_the_tokenizer_that_names_them_are_refused(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "in", tied=True)
    tuned_adapter(base, tmp_path / "adapter", new=NEW, rows=True)
    for file in (tmp_path / "adapter").glob("*token*"):
        file.unlink()
    with pytest.raises(ArtifactError, match=r"rows for 263 tokens.*Copy tokenizer_config"):
        bring_in(tmp_path / "adapter", tmp_path, PLAIN)


@pytest.mark.parametrize("lost", ON_A_TABLE)
def test_new_rows_that_an_adapter_does_not_contain_are_refused(lost: str, tmp_path: Path) -> None:
    base = saved_model(tmp_path / "in", tied=False)
    tuned_adapter(base, tmp_path / "adapter", new=NEW, **ON_A_TABLE[lost])
    with pytest.raises(ArtifactError, match=f"adds 3 tokens.*no rows for them in the {lost}, so"):
        bring_in(tmp_path / "adapter", tmp_path, PLAIN)
