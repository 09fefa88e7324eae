"""align: make language models follow instructions and preferences (SFT, RLHF, DPO, GRPO)."""

__version__ = "0.1.0"
