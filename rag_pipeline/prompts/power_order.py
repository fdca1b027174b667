"""An order of documents in which PowerAttention reads the best ones straight from the question.

With PowerAttention (arXiv 2503.03588) the last row of a prompt reads a window, the first blocks, and one block each at
distances that are powers of two. What stands elsewhere reaches it through other rows only, layer by layer. The order of
documents is free in RAG, so the best ones can stand where the question looks. The paper does not do this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

from rag_kernels import create_attention_method
from rag_kernels.sparse.static_blocks import StaticBlocks
from rag_pipeline.errors import RagPipelineError

_ROUNDS = 6
"""Most rounds of the search."""
_TRIED = 8
"""Best documents that change places, with each other and with all others; the rest matters little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where documents stand, and what the question reads of each.

    Attributes
    ----------
    order : tuple of int
        Documents by place in the prompt, as indices into the lengths that were given.
    shares : tuple of float
        For each document, in the order of the lengths: share of its tokens that the last row reads.
    """

    order: tuple[int, ...]
    shares: tuple[float, ...]

    def one_hop(self, best: int | None = None) -> int:
        """How many of the best documents, or of all, the last row reads as a whole."""
        return sum(share == 1.0 for share in self.shares[:best])


def placement_of(
    order: Sequence[int],
    lengths: Sequence[int],
    *,
    before: int,
    behind: int,
    method: str = "power",
) -> Placement:
    """Say what the last row reads of documents in a given order.

    Parameters
    ----------
    order : sequence of int
        Each index of `lengths` once, the first document of the prompt first.
    lengths : sequence of int
        Tokens of the documents, the best first.
    before, behind : int
        Tokens of the prompt in front of the documents, and behind them: system part and question.
    method : str
        PowerAttention or another static attention method, with its options: ``power:block=64``.

    Raises
    ------
    RagPipelineError
        An order or lengths that name no prompt, or a method that is not static.
    """
    return _Question(lengths, before, behind, method).place(_checked(order, len(lengths)))


def place_for_power(
    lengths: Sequence[int], *, before: int, behind: int, method: str = "power"
) -> Placement:
    """Order documents so that the last row reads as much as possible of the best ones; nothing is padded.

    A document counts with its share that is read, twice as much where that is all of it, and the less the lower its
    rank. The search swaps and moves documents for as long as that helps, from three orders: the best last, the best
    at both ends, and the best in the window with the others in front. So it is never worse than those by this count.

    Parameters and errors are those of :func:`placement_of`.
    """
    question = _Question(lengths, before, behind, method)
    ranks = list(range(len(lengths)))
    starts = [ranks[::-1], lost_in_the_middle_order(len(lengths)), question.window_order()]
    found = [question.climb(start) for start in starts]
    return question.place(max(found, key=question.value))


def lost_in_the_middle_order(count: int) -> list[int]:
    """Ranks with the best at both ends and the worst in the middle, the best of all last (arXiv 2307.03172)."""
    ranks = list(range(count))
    return [*ranks[1::2], *ranks[::2][::-1]]


class _Question:
    """What the last row of a prompt reads, whatever the order of its documents is."""

    def __init__(self, lengths: Sequence[int], before: int, behind: int, method: str) -> None:
        if min(lengths, default=1) < 1 or before < 0 or behind < 1:
            raise RagPipelineError(
                f"lengths of {min(lengths, default=1)} tokens and more, {before} before and {behind} behind them; "
                "documents and what stands behind them have at least 1 token each"
            )
        self.lengths, self.before = tuple(lengths), before
        self.total = before + sum(lengths) + behind
        self.behind = behind
        try:
            pattern = create_attention_method(method)
        except ValueError as error:
            raise RagPipelineError(str(error)) from None
        if not isinstance(pattern, StaticBlocks):
            raise RagPipelineError(
                f"attention method {method!r} chooses by the prompt; give a static one, such as 'power'"
            )
        size = pattern.config.block
        # Positions that are read, in front of each position: a share is one subtraction.
        is_read = [0] * self.total
        for block in pattern.decode_blocks(self.total - 1).tolist():
            stop = min((block + 1) * size, self.total)
            is_read[block * size : stop] = [1] * (stop - block * size)
        self._read_before = [0, *accumulate(is_read)]
        # The end of the prompt that is read without a gap.
        last_gap = max((at for at, read in enumerate(is_read) if not read), default=-1)
        self._window = self.total - last_gap - 1 - behind

    def shares(self, order: Sequence[int]) -> list[float]:
        shares, at = [0.0] * len(order), self.before
        for index in order:
            stop = at + self.lengths[index]
            shares[index] = (self._read_before[stop] - self._read_before[at]) / (stop - at)
            at = stop
        return shares

    def place(self, order: Sequence[int]) -> Placement:
        return Placement(order=tuple(order), shares=tuple(self.shares(order)))

    def value(self, order: Sequence[int]) -> float:
        return sum(
            (1.0 if share == 1.0 else share / 2) / (rank + 1)
            for rank, share in enumerate(self.shares(order))
        )

    def window_order(self) -> list[int]:
        """The best documents that fit into the window, at its end, the others in front of them."""
        inside: list[int] = []
        room = self._window
        for rank, length in enumerate(self.lengths):
            if length <= room:
                inside.append(rank)
                room -= length
        outside = [rank for rank in range(len(self.lengths)) if rank not in set(inside)]
        return outside[::-1] + inside[::-1]

    def climb(self, order: Sequence[int]) -> list[int]:
        """Swap two documents, or move one, for as long as that helps."""
        best, value = list(order), self.value(order)
        for _ in range(_ROUNDS):
            began = value
            for one, other in combinations(range(len(best)), 2):
                if min(best[one], best[other]) >= _TRIED:
                    continue
                swapped = best.copy()
                swapped[one], swapped[other] = swapped[other], swapped[one]
                moved = best.copy()
                moved.insert(other, moved.pop(one))
                for tried in (swapped, moved):
                    worth = self.value(tried)
                    if worth > value + 1e-12:
                        best, value = tried, worth
            if value == began:
                break
        return best


def _checked(order: Sequence[int], count: int) -> Sequence[int]:
    if sorted(order) != list(range(count)):
        raise RagPipelineError(f"order {list(order)} does not name each of {count} documents once")
    return order
