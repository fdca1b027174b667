"""When somebody computes, and when there is a pause."""

from __future__ import annotations

from typing import Any

from chunk_cache.tiers.pause import PAUSE_S, Pauses


def test_there_is_a_pause_before_the_first_step_and_some_time_after_each(clock: Any) -> None:
    pauses = Pauses(clock)
    assert pauses.is_pause()
    for _ in range(2):
        pauses.begin()
        clock.now += 10 * PAUSE_S
        assert not pauses.is_pause(), "it still computes"
        pauses.end()
        assert not pauses.is_pause(), "the next step may follow at once"
        clock.now += 2 * PAUSE_S
        assert pauses.is_pause()
