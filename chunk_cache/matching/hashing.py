"""Hashes of all token windows of a sequence, and the winnowing that keeps a few of them.

Winnowing (Schleimer, Wilkerson, Aiken: "Winnowing: Local Algorithms for Document Fingerprinting",
SIGMOD 2003): of every ``w`` consecutive window hashes keep the smallest, the rightmost of equals.
The choice depends on nothing but those ``w`` hashes, that is on ``k + w - 1`` tokens. Two sequences
that share a run of that length therefore keep the *same place* of the run, wherever the run stands
in each: the guarantee the matcher is built on. It holds for repetitive text as well, where the
paper's "robust" variant (which looks back at the previous choice) would give it up.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]

# Any odd multiplier is invertible modulo 2**64; this is 2**64 divided by the golden ratio.
_BASE = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_BASE_INVERSE = pow(_BASE, -1, 2**64)


class WindowHasher:
    """Polynomial hashes, modulo 2**64, of every window of ``num_tokens`` tokens.

    With ``P[i] = sum_{j<i} m(t_j) B**j``, the window at ``i`` hashes to
    ``(P[i+k] - P[i]) * B**-i``: a prefix sum and a product, no loop over the window. Tokens go
    through a 64-bit mixer first and the result through it again, so the low bits are as good as
    the high ones. Collisions cost time and nothing else: every find is compared token by token.

    Parameters
    ----------
    num_tokens : int
        Window length ``k``, at least 1.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._powers = np.ones(1, dtype=np.uint64)
        self._inverses = np.ones(1, dtype=np.uint64)

    @property
    def num_bytes(self) -> int:
        """Memory of the power tables."""
        return self._powers.nbytes + self._inverses.nbytes

    def __call__(self, ids: npt.NDArray[np.int32], seed: int) -> Hashes:
        """Hash all windows.

        Parameters
        ----------
        ids : ndarray
            int32 ``[N]``.
        seed : int
            64 bits that set namespaces apart: equal text in two of them has unrelated hashes.

        Returns
        -------
        numpy.ndarray
            uint64 ``[max(0, N - k + 1)]``.
        """
        count = ids.size - self.num_tokens + 1
        if count < 1:
            return np.zeros(0, dtype=np.uint64)
        if ids.size > self._powers.size:
            self._grow(2 * ids.size)
        salt = np.uint64(seed & _MASK)
        sums = np.empty(ids.size + 1, dtype=np.uint64)
        sums[0] = 0
        mixed = _mix(ids.astype(np.uint64) ^ salt)
        mixed *= self._powers[: ids.size]
        np.cumsum(mixed, out=sums[1:])
        windows = sums[self.num_tokens :] - sums[:count]
        windows *= self._inverses[:count]
        return _mix(windows)

    def _grow(self, size: int) -> None:
        def table(base: int) -> Hashes:
            factors = np.full(size, base, dtype=np.uint64)
            factors[0] = 1
            return np.cumprod(factors, dtype=np.uint64)

        # Replaced, never written in place: a reader in another thread keeps its table.
        self._inverses = table(_BASE_INVERSE)
        self._powers = table(_BASE)


def _mix(values: Hashes) -> Hashes:
    """Scramble 64-bit values by the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def winnow(hashes: Hashes, num_hashes: int) -> Positions:
    """Positions of the rightmost minimum of every window of ``num_hashes`` hashes.

    Parameters
    ----------
    hashes : Hashes
        uint64 ``[M]``.
    num_hashes : int
        Window length ``w``, at least 1.

    Returns
    -------
    numpy.ndarray
        int64, strictly increasing; empty if ``M < w`` (no window is complete).
    """
    if hashes.size < num_hashes:
        return np.zeros(0, dtype=np.int64)
    values = hashes
    places = np.arange(hashes.size, dtype=np.int64)
    width = 1
    while width < num_hashes:
        # Two overlapping windows of ``width`` make one of ``width + step``.
        step = min(width, num_hashes - width)
        left, right = values[:-step], values[step:]
        places = np.where(right <= left, places[step:], places[:-step])
        values = np.minimum(left, right)
        width += step
    # The rightmost minimum never moves left as the window slides right: equal ones are neighbours.
    keep = np.ones(places.size, dtype=np.bool_)
    np.not_equal(places[1:], places[:-1], out=keep[1:])
    return places[keep]


class Fingerprinter:
    """The fingerprints of a sequence: those window hashes that winnowing keeps.

    Windows of ``min_match // 2`` tokens, the smallest of every ``min_match - min_match // 2 + 1``
    hashes: of a run of ``min_match`` tokens that two sequences share, both keep the same place.

    Parameters
    ----------
    min_match : int
        Shortest shared run that must have a fingerprint, tokens; at least 1.
    """

    def __init__(self, min_match: int) -> None:
        self.window_tokens = max(1, min_match // 2)
        self._num_hashes = min_match - self.window_tokens + 1
        self._hasher = WindowHasher(self.window_tokens)

    @property
    def num_bytes(self) -> int:
        """Memory of the hasher's tables."""
        return self._hasher.num_bytes

    def __call__(self, ids: npt.NDArray[np.int32], namespace: str) -> tuple[Hashes, Positions]:
        """Hashes of the kept windows and where they start, in order.

        Parameters
        ----------
        ids : ndarray
            int32 ``[N]``.
        namespace : str
            Hexadecimal; equal text in two namespaces has unrelated fingerprints.
        """
        hashes = self._hasher(ids, int(namespace[:16], 16))
        places = winnow(hashes, self._num_hashes)
        return hashes[places], places
