"""All faults of the campaign, in the order of the table."""

from tests.faults.campaign import changes, damage, disk, hostile, kills, owners, servers, stops
from tests.faults.campaign.ledger import Fault

PARTS = (kills, stops, owners, changes, damage, disk, hostile, servers)


def catalogue(*, quick: bool) -> list[Fault]:
    """Return every fault; ``quick`` returns the small part that 'make test' injects."""
    return [fault for part in PARTS for fault in part.faults(quick=quick)]
