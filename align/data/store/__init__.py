"""Tokenized rows of large data sets, made once and read from files."""
