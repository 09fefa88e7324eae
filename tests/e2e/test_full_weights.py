"""Full weights of adapted models under checkpoint names, against peft's own merge."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parent))
from engine_models import tiny_model

from align.core.errors import TrainingError
from align.tuning.export import full_weights


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_full_weights_of_lora_equal_pefts_own_merge(modules_to_save):
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], modules_to_save=modules_to_save
    )
    model = get_peft_model(tiny_model(0, tied=False), config)
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = {name: tensor.clone() for name, tensor in full_weights(model)}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    merged = dict(model.merge_and_unload().named_parameters())
    assert found.keys() == merged.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name].detach(), atol=1e-6, rtol=1e-6)
    assert not torch.equal(found["lm_head.weight"], tiny_model(0, tied=False).lm_head.weight) or (
        modules_to_save is None
    )


def test_full_weights_refuse_an_adapter_on_a_tied_weight():
    model = get_peft_model(tiny_model(0, tied=True), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(TrainingError, match="one tied weight"):
        next(full_weights(model))
