"""What is compared: a stage's options, the settings of TRL that mean the same, and what differs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison of a loss and its gradient.

    Attributes:
        kind: stage of align, and with it TRL's trainer.
        ours: options of the stage. theirs: settings of the trainer's configuration.
        differs: why the two do not agree on one whole batch; empty if they agree.
        splits: why they do not agree on two micro-batches of one step; empty if they agree.
        on_policy: the policy is the one that sampled, so that every ratio is 1.
        cut: number of a response without a stop token; None cuts none.
        unscored: number of a response without a score; None scores all.
        sampler: correct for the sampler's probabilities, which TRL does with vLLM only.
        micro: whether to compare two micro-batches too.
    """

    kind: str
    ours: Options = field(default_factory=dict)
    theirs: Options = field(default_factory=dict)
    differs: str = ""
    splits: str = ""
    on_policy: bool = False
    cut: int | None = None
    unscored: int | None = None
    sampler: bool = False
    micro: bool = True


SCALES = {"std": "group", "none": "none", "batch": "batch"}
"""Names of `scale` here and of `scale_rewards` there."""
BATCH_STD = (
    "align divides by the std of the centered scores (2501.03262), TRL by that of the raw scores"
)
CLIP = {"low": 0.1, "high": 0.15}
GSPO_CLIP = {"low": 0.02, "high": 0.03}
CISPO_CLIP = {"low": 1.0, "high": 0.1}
PER_MICRO_BATCH = "align takes the mean over the step, TRL the mean of micro-batch means"

# TRL's loss_type and importance_sampling_level, what is the same here, and whether its denominator
# is one of the whole step (empty) or of a micro-batch.
OBJECTIVES: tuple[tuple[str, str, Options, str], ...] = (
    ("grpo", "token", {"aggregation": "sequence"}, ""),
    ("dapo", "token", {"aggregation": "token"}, ""),
    ("bnpo", "token", {"aggregation": "token"}, PER_MICRO_BATCH),
    ("dr_grpo", "token", {"aggregation": "constant"}, ""),
    ("luspo", "token", {"aggregation": "sequence_sum"}, ""),
    ("cispo", "token", {"objective": "cispo", "clip": CISPO_CLIP}, ""),
    (
        "grpo",
        "sequence",
        {"objective": "gspo", "aggregation": "sequence", "clip": GSPO_CLIP},
        "",
    ),
)


def _grpo() -> list[Case]:
    """Return every loss_type and level that exists here with every scale_rewards."""
    found = []
    for loss_type, level, options, splits in OBJECTIVES:
        ours = {"clip": CLIP, **options}
        clip = ours["clip"]
        # CISPO's epsilon_high is the bound of the weight itself.
        high = 1.0 + clip["high"] if loss_type == "cispo" else clip["high"]
        theirs = {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "epsilon": clip["low"],
            "epsilon_high": high,
        }
        found += [
            Case(
                "grpo",
                {**ours, "scale": scale},
                {**theirs, "scale_rewards": name},
                differs=BATCH_STD if scale == "batch" else "",
                splits=splits,
                micro=scale == "std",  # the scale is not a matter of micro-batches
            )
            for scale, name in SCALES.items()
        ]
    return found


def _kl() -> list[Case]:
    plain = {"coef": 0.1, "place": "loss", "estimator": "k3"}
    gspo = {"objective": "gspo", "aggregation": "sequence", "clip": GSPO_CLIP}
    sequence = {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": GSPO_CLIP["low"],
        "epsilon_high": GSPO_CLIP["high"],
    }
    return [
        Case(
            "grpo",
            {"kl": plain, "clip": CLIP},
            {"beta": 0.1, "use_bias_correction_kl": False, **_clip()},
        ),
        Case(
            "grpo",
            {"kl": {**plain, "corrected": True}, "clip": CLIP},
            {"beta": 0.1, "use_bias_correction_kl": True, **_clip()},
        ),
        Case(
            "grpo",
            {"kl": plain, **gspo},
            {"beta": 0.1, "use_bias_correction_kl": False, **sequence},
        ),
        Case(
            "grpo",
            {"kl": {**plain, "corrected": True}, **gspo},
            {"beta": 0.1, "use_bias_correction_kl": True, **sequence},
            differs="align weights the KL of a token by the token's own ratio, TRL by that of the "
            "response",
        ),
    ]


def _clip(**more: Any) -> dict[str, Any]:
    return {"epsilon": CLIP["low"], "epsilon_high": CLIP["high"], **more}


def _importance() -> list[Case]:
    """Return the corrections for the sampler's distribution."""
    found = []
    for level in ("token", "sequence"):
        bounds = {"cap": 1.3, "floor": 0.7} if level == "token" else {"cap": 3.0, "floor": 0.3}
        limits = {
            "vllm_importance_sampling_clip_min": bounds["floor"],
            "vllm_importance_sampling_clip_max": bounds["cap"],
        }
        ours = {
            "clip": CLIP,
            "importance": {"mode": "truncate", "level": level, "cap": bounds["cap"]},
        }
        mode = {"vllm_importance_sampling_mode": f"{level}_truncate"}
        upper = {"vllm_importance_sampling_clip_max": bounds["cap"]}
        found.append(Case("grpo", ours, _clip(**mode, **upper), sampler=True))
        ours = {"clip": CLIP, "importance": {"mode": "mask", "level": level, **bounds}}
        mode = {"vllm_importance_sampling_mode": f"{level}_mask"}
        found.append(Case("grpo", ours, _clip(**mode, **limits), sampler=True))
    return found


def _online_edges() -> list[Case]:
    return [
        Case("grpo", {"clip": {**CLIP, "dual": 1.2}}, _clip(delta=1.2)),
        Case(
            "grpo",
            {"clip": CLIP},
            _clip(),
            unscored=1,
            differs="align leaves a response without a score out of every denominator; TRL trains "
            "its tokens with advantage 0",
        ),
        Case(
            "grpo",
            {"clip": CLIP, "truncation": "mask"},
            _clip(mask_truncated_completions=True),
            cut=1,
            differs="align leaves a masked response out of its group's mean and std; TRL keeps it",
        ),
        Case(
            "rloo",
            {"algorithm": "rloo", "kl": {"coef": 0.1, "place": "reward", "estimator": "k1"}},
            {"beta": 0.1, "epsilon": 0.2},
            on_policy=True,
            differs="align uses the ratio of each token, TRL that of the response; on policy the "
            "gradient is the same but the loss is not",
        ),
    ]


def _preferences() -> list[Case]:
    sums = (
        "align averages over the chosen tokens of each response, TRL over those of the whole batch"
    )
    return [
        Case("dpo", {"loss": "sigmoid"}, {"loss_type": ["sigmoid"]}),
        Case("dpo", {"loss": "sigmoid_norm"}, {"loss_type": ["sigmoid_norm"]}),
        Case("dpo", {"loss": "hinge"}, {"loss_type": ["hinge"]}),
        Case("dpo", {"loss": "ipo"}, {"loss_type": ["ipo"]}),
        Case(
            "dpo",
            {"loss": "robust", "label_smoothing": 0.1},
            {"loss_type": ["robust"], "label_smoothing": 0.1},
        ),
        Case("dpo", {"ld_alpha": 0.4}, {"loss_type": ["sigmoid"], "ld_alpha": 0.4}),
        Case(
            "dpo",
            {"label_smoothing": 0.1},
            {"loss_type": ["sigmoid"], "label_smoothing": 0.1},
            differs="cDPO; TRL's sigmoid ignores label_smoothing",
        ),
        Case(
            "dpo",
            {"nll_coef": 0.5},
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
            differs=f"2404.19733: {sums}",
        ),
        Case(
            "cpo",
            {"loss": "simpo", "beta": 2.0, "gamma": 0.8, "label_smoothing": 0.1},
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.8}
            | {"label_smoothing": 0.1},
        ),
        Case(
            "orpo",
            {"loss": "orpo", "beta": 0.3},
            {"beta": 0.3},
            differs="align uses the likelihood of the response; TRL that of prompt and response, "
            "averaged over all tokens",
        ),
        Case(
            "kto",
            {"desirable_weight": 1.2, "undesirable_weight": 0.7},
            {"desirable_weight": 1.2, "undesirable_weight": 0.7},
            splits="align computes the reference point over the step, TRL over the micro-batch",
        ),
        Case("reward", {"center_coef": 0.0}, {}),
        Case("reward", {"center_coef": 0.01}, {"center_rewards_coefficient": 0.01}),
        Case("reward", {"center_coef": 0.0, "use_margin": True}, {"margin": True}),
    ]


CASES: tuple[Case, ...] = (
    Case("sft"),
    Case("sft", {"label_smoothing": 0.1}, {"label_smoothing_factor": 0.1}),
    *_preferences(),
    *_grpo(),
    *_kl(),
    *_importance(),
    *_online_edges(),
)

LACKS: Mapping[str, tuple[str, ...]] = {
    "SFT `loss_type`": ("dft",),
    "DPO `loss_type`": (
        *("exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop"),
    ),
    "DPO `f_divergence_type`": ("forward_kl", "js_divergence", "alpha_divergence"),
    "DPO settings": ("use_weighting",),
    "KTO `loss_type`": ("apo_zero_unpaired",),
    "GRPO `loss_type`": ("sapo", "vespo"),
    'GRPO `loss_type` with `importance_sampling_level="sequence"`': (
        *("dapo", "bnpo", "dr_grpo", "luspo", "cispo"),
    ),
    "GRPO settings": (
        *("entropy_coef", "top_entropy_quantile", "off_policy_mask_threshold"),
        "multi_objective_aggregation",
    ),
}
"""What TRL 1.16 computes and align does not."""
