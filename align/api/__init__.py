"""The suite from Python: functions that build a recipe and run it, and the run as an object."""
