"""Content-defined anchors: the borders that an edit elsewhere in the document cannot move.

A border is an anchor when its key (how good a break it is, then a hash of the two atoms it parts)
is the smallest within `window` tokens on both sides. That depends on nothing outside the window,
so all anchors further than the window from an edit stay where they were. Two anchors are always
more than `window` tokens apart, on random text about twice that on average.

Local extrema instead of a rolling hash with a divisor: the latter has no least distance, and a
least distance enforced from left to right is what lets an edit travel through a document. The
idea is that of local-maximum chunking: Bjørner, Blass, Gurevich, "Content-dependent chunking for
differential compression, the local maximum approach", 2010 (J. Comput. Syst. Sci. 76).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate, pairwise

from retrievers.splitter.atoms import Atom


def border_keys(text: str, atoms: Sequence[Atom]) -> list[tuple[int, bytes]]:
    """Key of the border before each atom; smaller means a better anchor."""
    keys = [(int(atoms[0].boundary), b"")] if atoms else []
    for left, right in pairwise(atoms):
        joined = f"{text[left.start : left.end]}\0{text[right.start : right.end]}"
        digest = hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        keys.append((int(right.boundary), digest))
    return keys


def find_anchors(
    keys: Sequence[tuple[int, bytes]], token_counts: Sequence[int], window: int
) -> list[int]:
    """Find the atoms that begin at an anchor.

    Parameters
    ----------
    keys : sequence of (int, bytes)
        One key an atom, of the border before it (:func:`border_keys`).
    token_counts : sequence of int
        Tokens of every atom, in the same order.
    window : int
        Reach of the comparison to both sides, in tokens.

    Returns
    -------
    list of int
        Ascending atom indices, always with 0 when there are atoms. Borders within `window` of the
        document's ends are not anchors, else the first and last chunk would often be tiny.
    """
    if not keys:
        return []
    *positions, total = accumulate(token_counts, initial=0)
    count = len(keys)
    is_anchor = [window < position < total - window for position in positions]

    # Previous border with a key as small (ties go to the left one), by a monotonic stack.
    stack: list[int] = []
    for i in range(count):
        while stack and keys[stack[-1]] > keys[i]:
            stack.pop()
        if stack and positions[i] - positions[stack[-1]] <= window:
            is_anchor[i] = False
        stack.append(i)
    # Next border with a smaller key.
    stack.clear()
    for i in range(count - 1, -1, -1):
        while stack and keys[stack[-1]] >= keys[i]:
            stack.pop()
        if stack and positions[stack[-1]] - positions[i] <= window:
            is_anchor[i] = False
        stack.append(i)
    return [0, *(i for i in range(1, count) if is_anchor[i])]
