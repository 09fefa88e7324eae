"""Convert configurations of axolotl, LLaMA-Factory and TRL to recipes."""
