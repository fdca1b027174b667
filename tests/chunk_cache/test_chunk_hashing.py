"""Window hashes and winnowing, against their definitions."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_cache.matching.hashing import WindowHasher, winnow


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 9))
def test_winnowing_keeps_the_rightmost_minimum_of_every_window(values: list[int], width: int):
    hashes = np.array(values, dtype=np.uint64)
    expected = set()
    for start in range(len(values) - width + 1):
        window = values[start : start + width]
        expected.add(start + width - 1 - window[::-1].index(min(window)))
    assert winnow(hashes, width).tolist() == sorted(expected)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 8), st.integers(0, 2**64 - 1))
def test_equal_windows_hash_equally_wherever_they_stand(values: list[int], k: int, seed: int):
    hashes = WindowHasher(k)(np.array(values, dtype=np.int32), seed).tolist()
    windows = [tuple(values[i : i + k]) for i in range(len(values) - k + 1)]
    assert len(hashes) == len(windows)
    # Equal windows hash equally; different ones differ (but for chance of about 2**-50).
    assert len(set(hashes)) == len(set(windows))
    assert len(set(zip(hashes, windows, strict=True))) == len(set(windows))
