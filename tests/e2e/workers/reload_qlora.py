"""Read what a qlora stage saved with transformers, peft and bitsandbytes alone.

    python reload_qlora.py BASE_MODEL STAGE_FOLDER ROWS_JSON OUT_JSON

ROWS_JSON lists token ids; OUT_JSON gets, for ``adapter`` (on the 4-bit base) and ``model``, the
log-probability of each token of each row but the first.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def logprobs(model: Any, ids: list[int]) -> list[float]:
    """Score a row by one plain forward pass."""
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [found[t - 1, ids[t]].item() for t in range(1, len(ids))]


def main() -> None:
    """Write the log-probabilities."""
    torch.set_num_threads(1)
    base, stage, rows, out = sys.argv[1:]
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    started: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=four_bits
    )
    for module in started.modules():
        # On CPUs with bfloat16 instructions the first pass would round what weights are scaled by.
        module.support_avx512bf16_for_cpu = False
    models = {
        "adapter": PeftModel.from_pretrained(started, f"{stage}/adapter"),
        "model": AutoModelForCausalLM.from_pretrained(f"{stage}/model", dtype=torch.float32),
    }
    held = json.loads(Path(rows).read_text(encoding="utf-8"))
    found = {name: [logprobs(m.eval(), ids) for ids in held] for name, m in models.items()}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


main()
