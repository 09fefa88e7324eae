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
    """Put each row into the first micro-batch with room for it."""
    micros: list[list[int]] = []
    # First fit, longest first: the shorter rows fill what the long ones leave.
    room = _Room(len(rows), micro_tokens)
    for i in rows:
        place = room.take(lengths[i])
        if place == len(micros):
            micros.append([])
        micros[place].append(i)
    return micros


class _Room:
    """The room that is left in each of ``num`` micro-batches, all empty at first.

    A binary tree: node n has the children 2n and 2n + 1, and the largest room below it.
    """

    def __init__(self, num: int, tokens: int) -> None:
        self._leaves = 1 << max(num - 1, 0).bit_length()
        self._tokens, self._largest = tokens, [tokens] * (2 * self._leaves)

    def take(self, length: int) -> int:
        """Reserve room in the first micro-batch that has enough, and return its place.

        A row longer than a whole micro-batch gets an empty one to itself.
        """
        largest, node = self._largest, 1
        wanted = min(length, self._tokens)
        # Down to the first leaf with enough room, then up again.
        while node < self._leaves:
            node = 2 * node if largest[2 * node] >= wanted else 2 * node + 1
        place = node - self._leaves
        # A row longer than a micro-batch leaves less than no room, so that nothing joins it.
        largest[node] -= length
        while node > 1:
            node //= 2
            largest[node] = max(largest[2 * node], largest[2 * node + 1])
        return place
