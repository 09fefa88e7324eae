"""Import what stages need; the fork server of tests/e2e/warm.py imports this module."""

from tests.faults.campaign.forked import preload

preload(vllm=False)
