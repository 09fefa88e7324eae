"""Faults planted in the code, each of which a near test must find: ``make mutants``."""
