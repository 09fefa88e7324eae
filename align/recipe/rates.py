"""Learning rates by tuning method: the default, the range that is known, and the source of both."""

from dataclasses import dataclass

SUPERVISED = ("sft", "reward", "classify")
POLICY = ("dpo", "kto", "ppo", "grpo")


@dataclass(frozen=True, slots=True)
class Rates:
    """Hold what is known of a method's learning rate.

    Attributes:
        default: taken where a recipe leaves the rate out.
        low, high: outside of these ``align check`` warns.
        source: where the numbers come from, and which are our choice.
    """

    default: float
    low: float
    high: float
    source: str


_LORA = Rates(
    2e-4, 1e-4, 3e-4,
    "1e-4 to 2e-4 from 7B to 65B (arXiv:2305.14314 appendix B), 2e-4 for GPT-3 (arXiv:2106.09685 "
    "appendix D), in Zephyr's qlora recipe and in TRL's example",
)  # fmt: skip
_PEFT = "peft's comparison of methods on Llama-3.2-3B (method_comparison/MetaMathQA)"
RATES: dict[str, Rates] = {
    "full": Rates(
        2e-5, 1e-5, 5e-5,
        "2e-5 to 5e-5 for BERT (arXiv:1810.04805 appendix A.3), 2e-5 for Llama 2 "
        "(arXiv:2307.09288 section 3.1), DeepSeekMath's reward model (arXiv:2402.03300) and TRL's "
        "default of sft",
    ),
    "head": Rates(
        1e-3, 1e-4, 1e-2,
        "Adam's own 1e-3 (arXiv:1412.6980 algorithm 1) for a layer alone; a factor of 10 either "
        "way is our choice",
    ),
    "lora": _LORA,
    "rslora": _LORA,
    "dora": _LORA,
    "qlora": _LORA,
    "pissa": Rates(
        2e-5, 1e-5, 5e-5,
        "2e-5 in its authors' scripts for Llama 2 (arXiv:2404.02948): it trains the leading part "
        "of the weights themselves",
    ),
    "ia3": Rates(
        5e-3, 1e-3, 1e-2,
        f"3e-3 in its authors' configuration of T0 (arXiv:2205.05638, Adafactor), 5e-3 in {_PEFT}",
    ),
    "oft": Rates(1e-4, 3e-5, 3e-4, f"1e-4 in {_PEFT}; a factor of 3 either way is our choice"),
    "vera": Rates(
        1e-3, 1e-4, 2e-2,
        f"1e-4 in {_PEFT}, 2e-2 in peft's example for RoBERTa; the default in between is our "
        "choice",
    ),
    "bottleneck": Rates(
        3e-4, 3e-5, 3e-3,
        "3e-4 in its authors' example for BERT, the middle of the rates that they tried "
        "(arXiv:1902.00751 section 3)",
    ),
    "prefix": Rates(
        1e-3, 5e-5, 5e-3,
        f"5e-5 in its authors' runs of GPT-2 (arXiv:2101.00190), 1e-3 and 5e-3 in {_PEFT}",
    ),
    "prompt": Rates(
        1e-3, 1e-3, 3e-1,
        "0.3 for T5 (arXiv:2104.08691 section 3, Adafactor); with AdamW 1e-3 in "
        f"{_PEFT} and 3e-2 in its guide",
    ),
    "ptuning": Rates(
        1e-4, 3e-5, 1e-3,
        f"1e-4 and, with an LSTM, 5e-4 in {_PEFT}; the ends of the range are our choice",
    ),
    "loreft": Rates(
        9e-4, 3e-4, 3e-3,
        "9e-4 in its authors' commands for Llama (arXiv:2404.03592); a factor of 3 either way is "
        "our choice",
    ),
}  # fmt: skip
"""Method to its rates in the stages that learn from right answers (sft, reward, classify)."""

POLICY_SOURCES = {
    "full": "5e-7 for Zephyr (its dpo recipe, arXiv:2310.16944), 1e-6 for DeepSeekMath "
    "(arXiv:2402.03300) and TRL's default of dpo, kto and grpo, 3e-6 for PPO (arXiv:2403.17031), "
    "5e-7 to 5e-6 in TRL's advice on kto",
    "lora": "5e-6 in Zephyr's qlora recipe of dpo, 1e-5 in TRL's advice on dpo and in its runs of "
    "grpo; the upper end is our choice",
}
"""What the rates of policy optimisation rest on; a method without an entry takes their ratio."""


def known_rates(kind: str, method: str) -> Rates | None:
    """Give what is known of a method's rate in a stage; None for a stage or method without any.

    Policy optimisation takes a twentieth of the supervised default, from a twentieth of the lowest
    to a tenth of the highest rate: so published rates of full and LoRA training relate.
    """
    found = RATES.get(method)
    if found is None or kind in SUPERVISED:
        return found
    if kind not in POLICY:
        return None
    family = "lora" if found is _LORA else method
    source = POLICY_SOURCES.get(
        family,
        f"1/20 to 1/10 of its supervised rates, as with full and lora, is our choice; those: "
        f"{found.source}",
    )
    shares = (found.default / 20, found.low / 20, found.high / 10)
    default, low, high = (float(f"{rate:.3g}") for rate in shares)
    return Rates(default, low, high, source)
