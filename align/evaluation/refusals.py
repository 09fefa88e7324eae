"""Name the side of a preference pair that declines."""

from reward_models.refusals import declines


def refusing_side(chosen: str, rejected: str) -> str:
    """Name the side of a pair that declines: neither, chosen, rejected or both."""
    sides = (declines(chosen), declines(rejected))
    return {(False, False): "neither", (True, False): "chosen", (False, True): "rejected"}.get(
        sides, "both"
    )
