"""Render conversations as token ids with a training mask."""
