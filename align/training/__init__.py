"""The learner (the only code that calls DeepSpeed) and the offline training loop."""
