"""Parameter-efficient tuning: LoRA and related methods."""
