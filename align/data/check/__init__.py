"""Check data files and report problems before training."""

from align.data.check.run import Report, Request, check_data

__all__ = ["Report", "Request", "check_data"]
