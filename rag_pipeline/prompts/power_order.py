"""An order of documents in which PowerAttention reads the best ones straight from the question.

With PowerAttention (arXiv 2503.03588) the last row of a prompt reads a window, the first blocks, and one block each at
distances that are powers of two. What stands elsewhere reaches it through other rows only, layer by layer. The order of
documents is free in RAG, so the best ones can stand where the question looks. The paper does not do this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rag_kernels import create_attention_method
from rag_kernels.sparse.static_blocks import StaticBlocks
from rag_pipeline.errors import RagPipelineError

_STEPS = 64
"""Most swaps and moves of a search."""
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


def static_method(text: str) -> StaticBlocks:
    """Make the static attention method of a text such as ``power:block=64``.

    Raises
    ------
    RagPipelineError
        No such method, or one that chooses its keys by the prompt.
    """
    try:
        method = create_attention_method(text)
    except ValueError as error:
        raise RagPipelineError(str(error)) from None
    if not isinstance(method, StaticBlocks):
        raise RagPipelineError(
            f"attention method {text!r} chooses by the prompt; give a static one, such as 'power'"
        )
    return method


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
        self._lengths = np.array(self.lengths, dtype=np.int64)
        self.total = before + sum(lengths) + behind
        self.behind = behind
        pattern = static_method(method)
        size = pattern.config.block
        # Positions that are read, in front of each position: a share is one subtraction.
        is_read = np.zeros(self.total, dtype=np.int64)
        for block in pattern.decode_blocks(self.total - 1).tolist():
            stop = min((block + 1) * size, self.total)
            is_read[block * size : stop] = 1
        self._read_before = np.concatenate([[0], np.cumsum(is_read)])
        # The end of the prompt that is read without a gap.
        last_gap = int((is_read == 0).nonzero()[0].max(initial=-1))
        self._window = self.total - last_gap - 1 - behind

    def _read(self, orders: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Lengths of the documents of each order ``[orders, documents]``, and their tokens that are read."""
        lengths = self._lengths[orders]
        ends = self.before + lengths.cumsum(axis=1)
        return lengths, self._read_before[ends] - self._read_before[ends - lengths]

    def place(self, order: Sequence[int]) -> Placement:
        lengths, read = self._read(np.array([order], dtype=np.int64))
        shares = dict(zip(order, (read / lengths)[0].tolist(), strict=True))
        return Placement(order=tuple(order), shares=tuple(shares[i] for i in range(len(order))))

    def values(self, orders: NDArray[np.int64]) -> NDArray[np.float64]:
        lengths, read = self._read(orders)
        worth = np.where(read == lengths, 1.0, read / lengths / 2) / (orders + 1)
        total: NDArray[np.float64] = worth.sum(axis=1)
        return total

    def value(self, order: Sequence[int] | NDArray[np.int64]) -> float:
        return float(self.values(np.array([order], dtype=np.int64))[0])

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
        """Take the swap of two documents, or the move of one, that helps most, for as long as one does."""
        best = np.array(order, dtype=np.int64)
        value = self.value(best)
        for _ in range(_STEPS):
            tried = _neighbours(best)
            if not len(tried):
                break
            worth = self.values(tried)
            at = int(worth.argmax())
            if worth[at] <= value + 1e-12:
                break
            best, value = tried[at], float(worth[at])
        return [int(rank) for rank in best]


def _neighbours(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Orders that one swap or one move of a document makes of another; ``[orders, documents]``."""
    count = len(order)
    one, other = np.triu_indices(count, 1)
    is_tried = np.minimum(order[one], order[other]) < _TRIED
    one, other = one[is_tried], other[is_tried]
    place = np.arange(count)[None]
    swapped = np.repeat(place, len(one), axis=0)
    row = np.arange(len(one))
    swapped[row, one], swapped[row, other] = other, one
    between = (place >= one[:, None]) & (place < other[:, None])
    moved = np.where(place == other[:, None], one[:, None], place + between)
    found: NDArray[np.int64] = order[np.concatenate([swapped, moved])]
    return found


def _checked(order: Sequence[int], count: int) -> Sequence[int]:
    if sorted(order) != list(range(count)):
        raise RagPipelineError(f"order {list(order)} does not name each of {count} documents once")
    return order
