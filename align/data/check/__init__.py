"""Look at data files and say what is wrong with them, before anything is trained."""

from align.data.check.run import Report, Request, check_data

__all__ = ["Report", "Request", "check_data"]
