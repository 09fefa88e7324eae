"""A merged bfloat16 weight keeps the update of its adapter, however small."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import save_tiny, tiny_model

from align.recipe.schema.tuning import LoraTuning
from align.tuning.export import full_weights
from align.tuning.loading import load_for_training
from align.tuning.merging import keep_update

N = 200_000


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_goes_up_as_often_as_the_upper_neighbour_is_near(share, sign):
    # Between 1 and 2 neighbours of bfloat16 are 2^-7 apart.
    low, step = sign * 1.25, sign * 2.0**-7
    rounded = keep_update(torch.full((N,), low + share * step), torch.bfloat16)
    up = rounded.float() == low + step
    assert bool(((rounded.float() == low) | up).all())
    # Five standard errors of a share of N draws, sqrt(s (1 - s) / N).
    assert float(up.float().mean()) == pytest.approx(
        share, abs=5 * (share * (1 - share) / N) ** 0.5
    )


def test_rounding_is_the_same_each_time_and_leaves_what_it_must():
    x = torch.randn(33, 77, generator=torch.Generator().manual_seed(1))
    assert torch.equal(keep_update(x, torch.bfloat16), keep_update(x.clone(), torch.bfloat16))
    held = x.bfloat16()
    assert torch.equal(keep_update(held.float(), torch.bfloat16), held)  # no update, no change
    assert torch.equal(keep_update(x, torch.float32), x)
    odd = torch.tensor([float("inf"), -float("inf"), 0.0])
    assert torch.equal(keep_update(odd, torch.bfloat16), odd.bfloat16())
    strange = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)  # a NaN of all ones
    assert keep_update(strange, torch.bfloat16).isnan().all()


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_full_weights_in_bfloat16_hold_the_whole_update(tmp_path, method):
    """The part of the update that is in the merged weights: <W' - W, D> / <D, D>, D in float64."""
    folder = save_tiny(tiny_model(0, tied=True).bfloat16(), tmp_path)
    tuning = LoraTuning(method=method, rank=4, alpha=8)
    model = load_for_training(folder, tuning, dtype="bfloat16")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # updates of about 1e-4 on weights of 0.15
                parameter += 1e-4 * torch.randn(parameter.shape, generator=generator)
    model.requires_grad_(False)
    named = dict(full_weights(model))
    base = tiny_model(0, tied=True).bfloat16().state_dict()
    kept, whole, nearest = 0.0, 0.0, 0.0
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A") or not len(layer.lora_A):
            continue
        a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        scale = 8 / 4 if method != "rslora" else 8 / 4**0.5
        update = scale * b.double() @ a.double()
        before = base[f"{name}.weight"].double()
        total = before + update
        kept += float(((named[f"{name}.weight"].double() - before) * update).sum())
        nearest += float(((total.bfloat16().double() - before) * update).sum())
        whole += float((update * update).sum())
    assert kept / whole == pytest.approx(1.0, abs=0.15)
    assert abs(nearest / whole - 1.0) > 0.3  # rounding to the nearest loses it
