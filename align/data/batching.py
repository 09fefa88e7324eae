"""Plan which rows share a forward pass, with a token budget and equally many passes per rank."""

from collections.abc import Sequence


def plan_micro_batches(
    lengths: Sequence[int], *, micro_tokens: int, ranks: int, padded: bool = False
) -> list[list[list[int]]]:
    """Distribute the rows of one optimizer step over ranks and micro-batches.

    The longest rows are dealt first, each to the rank with the fewest tokens so far. Each rank then
    packs its rows, longest first, into micro-batches by first fit. Ranks with fewer micro-batches
    get empty ones, because every rank must issue the same collectives.

    Args:
        lengths: tokens of each row.
        micro_tokens: token budget of one micro-batch; only a single longer row exceeds it.
        ranks: number of processes.
        padded: True if rows are padded to the longest row of their micro-batch. The budget then
            includes the padding, and rows of similar length are grouped.

    Returns:
        ``plan[rank][micro]``, a list of indices into ``lengths``. Every index occurs exactly once.
    """
    assert micro_tokens >= 1, micro_tokens
    assert ranks >= 1, ranks
    # Deal rows to ranks.
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in order:
        # Ties go to the rank with fewer rows, then to the lower rank: every rank makes the same
        # plan.
        rank = min(range(ranks), key=lambda r: (load[r], len(dealt[r]), r))
        dealt[rank].append(i)
        load[rank] += lengths[i]
    # Pack each rank's rows, then pad all ranks to the same number of micro-batches.
    fit = _in_order if padded else _first_fit
    plan = [fit(rows, lengths, micro_tokens=micro_tokens) for rows in dealt]
    most = max((len(micros) for micros in plan), default=0)
    return [micros + [[] for _ in range(most - len(micros))] for micros in plan]


def _in_order(rows: list[int], lengths: Sequence[int], *, micro_tokens: int) -> list[list[int]]:
    """Start a new micro-batch where padding the next row to the longest would exceed the budget."""
    micros: list[list[int]] = []
    for i in rows:
        if not micros or (len(micros[-1]) + 1) * lengths[micros[-1][0]] > micro_tokens:
            micros.append([])
        micros[-1].append(i)
    return micros


def _first_fit(rows: list[int], lengths: Sequence[int], *, micro_tokens: int) -> list[list[int]]:
    micros: list[list[int]] = []
    room: list[int] = []
    for i in rows:
        # First fit, longest first: the shorter rows fill what the long ones leave.
        place = next((k for k, left in enumerate(room) if lengths[i] <= left), None)
        if place is None:
            place = len(micros)
            micros.append([])
            room.append(micro_tokens)
        micros[place].append(i)
        room[place] -= lengths[i]
    return micros
