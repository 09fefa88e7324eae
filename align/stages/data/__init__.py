"""Stages that produce training rows."""
