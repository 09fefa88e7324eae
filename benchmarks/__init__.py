"""Speed, memory and equality of align and TRL on the same work: ``make bench``."""
