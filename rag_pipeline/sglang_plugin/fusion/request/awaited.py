"""What a request waits for: its chunks, on their way from below memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from chunk_cache import Candidate, Fetch


class Awaited:
    """The part of a :class:`~.state.RequestState` that is about KV below memory; changed by its methods alone."""

    __slots__ = ("_asked_at", "_fetches", "_has_begun", "_lookup", "_wanted")

    def __init__(self) -> None:
        self._fetches: tuple[Fetch, ...] = ()
        self._asked_at = 0.0
        self._has_begun = False
        self._wanted: tuple[tuple[Candidate, ...], ...] = ()
        self._lookup: threading.Event | None = None

    @property
    def fetches(self) -> tuple[Fetch, ...]:
        """Chunks that are on their way from a lower tier."""
        return self._fetches

    @property
    def asked_at(self) -> float:
        """When the scheduler first considered the request while they were, :func:`time.monotonic`."""
        return self._asked_at

    @property
    def wanted(self) -> tuple[tuple[Candidate, ...], ...]:
        """Per chunk the records that would serve it, the best first; empty where nobody will ask."""
        return self._wanted

    @property
    def lookup(self) -> threading.Event | None:
        """Set as soon as it is known what shared tiers have of the conversation; None where nobody asks, or waits."""
        return self._lookup

    @property
    def has_begun(self) -> bool:
        """Whether its chunks were looked for below memory."""
        return self._has_begun

    def expect(self, wanted: tuple[tuple[Candidate, ...], ...]) -> None:
        """Note :attr:`wanted`."""
        self._wanted = wanted

    def await_lookup(self, lookup: threading.Event | None) -> None:
        """Note :attr:`lookup`."""
        self._lookup = lookup

    def await_fetches(self, fetches: Iterable[Fetch]) -> None:
        """Wait for these chunks, or for none any more."""
        self._fetches = tuple(fetches)
        self._has_begun = True

    def note_asked(self) -> None:
        """Note :attr:`asked_at`, the first time."""
        self._asked_at = self._asked_at or time.monotonic()
