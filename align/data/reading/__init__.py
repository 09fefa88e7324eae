"""Find, open and parse data files."""
