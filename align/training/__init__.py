"""The learner (the only code that drives DeepSpeed) and the offline epoch loop."""
