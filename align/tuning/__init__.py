"""Which weights are trained: LoRA and its relatives."""
