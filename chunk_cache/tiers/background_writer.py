"""Chunk records on their way to a lower tier: written by a thread of their own, dropped when it cannot keep up.

A disk may be slow and a network folder may hang; whoever made a record never waits for either. Writing takes cores and
memory's bandwidth from a forward that runs beside it, so the thread waits for a pause; that wait is bounded.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from chunk_cache.keys import ChunkKey, KVContext
from chunk_cache.records import ChunkKV
from chunk_cache.thread_priority import give_way
from chunk_cache.tiers.base import Tier

QUEUE_BYTES = 256 << 20
"""Records that wait for the disk, bytes; they stay in memory for so long, evicted or not."""
HOLD_S = 2.0
"""Longest that a record waits for a pause, seconds."""
_LOOK_S = 0.05
"""How often it is looked whether there is one."""
_NICE = 10
"""Added to the process's nice value for the thread: a tenth of a core writes more than a core computes."""
_NOTE_USE_S = 30.0
"""How often the use of records is noted on their files."""
_REMOVE_AGAIN_S = 1.0
"""How often a removal that a tier refused is tried again."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    record: ChunkKV
    context: KVContext
    tenant: str
    since: float
    """Moment of :func:`time.monotonic`."""


class BackgroundWriter:
    """A bounded queue before a :class:`Tier`, and the thread that empties it.

    Parameters
    ----------
    tier : Tier
        Where to; only the thread writes to it.
    count : callable
        Called with ``written``, ``dropped`` (the queue was full), ``no_room`` (the budget is),
        ``write_failed`` or ``erased`` for every record, from either thread; ``remove_failed`` each time that the
        tier refused to remove what was erased while it was written.
    wrote : callable
        Called with the bytes of a record in memory and the seconds that the tier took for it, from the thread, for
        every record that the tier answered for. The record waits no longer then.
    failed : callable
        Called with what a disk refused, from the thread.
    is_erased : callable
        Whether a record of a tenant (:func:`~.tenant_mark`) must not reach the disk; asked before it is written,
        and after.
    used : callable
        Keys of records that were used since a moment of :func:`time.monotonic`.
    group_of : callable
        Group of the records of a context (:meth:`Tier.note_member`); None for none.
    is_pause : callable
        Whether writing disturbs nobody now. Where it does a record waits, for :data:`HOLD_S` at most, and as long as
        half of the queue is free; who drains or closes does not wait for a pause.
    queue_bytes : int
        Most bytes that wait.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        count: Callable[[str], None],
        failed: Callable[[OSError], None],
        is_erased: Callable[[ChunkKV, str], bool] = lambda record, tenant: False,
        used: Callable[[float], Iterable[ChunkKey]] = lambda since: (),
        wrote: Callable[[int, float], None] = lambda num_bytes, seconds: None,
        group_of: Callable[[KVContext], str | None] = lambda context: None,
        is_pause: Callable[[], bool] = lambda: True,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.tier = tier
        self._count = count
        self._failed = failed
        self._is_erased = is_erased
        self._used = used
        self._wrote = wrote
        self._group_of = group_of
        self._is_pause = is_pause
        self._queue_bytes = queue_bytes
        self._queue: deque[_Waiting] = deque()
        self._bytes = 0
        self._current: _Waiting | None = None
        self._current_is_erased = False
        self._current_is_done = False
        """Nothing of it waits any more, and whoever counts is being told."""
        self._to_remove: set[ChunkKey] = set()
        """What was erased while it was written, and the tier refused to remove; the thread's own."""
        self._stopping = False
        self._draining = 0
        """How many wait for the queue to be empty."""
        self._noted = time.monotonic()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="chunk-kv-writer", daemon=True)
        self._thread.start()

    def put(self, record: ChunkKV, context: KVContext, tenant: str) -> bool:
        """Queue a record of a tenant; ``False`` where it is dropped. Never waits for the disk."""
        with self._changed:
            room = self._bytes + record.num_bytes <= self._queue_bytes and not self._stopping
            if room:
                self._queue.append(_Waiting(record, context, tenant, time.monotonic()))
                self._bytes += record.num_bytes
                self._changed.notify_all()
        if not room:
            self._count("dropped")
        return room

    @property
    def pending(self) -> int:
        """Records that are not on the disk yet."""
        with self._changed:
            is_writing = self._current is not None and not self._current_is_done
            return len(self._queue) + is_writing

    @property
    def pending_bytes(self) -> int:
        """Bytes of those records; they are in memory."""
        return self._bytes

    def clear(self) -> None:
        """Forget what waits."""
        with self._changed:
            self._queue.clear()
            current = None if self._current_is_done else self._current
            self._bytes = 0 if current is None else current.record.num_bytes
            self._changed.notify_all()

    def erase(self) -> None:
        """Forget what waits and must not reach the disk any more, however long the disk takes."""
        self._forget(lambda one: self._is_erased(one.record, one.tenant))

    def forget(self, key: ChunkKey) -> None:
        """Forget a record that waits; one that is just being written is removed behind it."""
        self._forget(lambda one: one.record.key == key)

    def _forget(self, is_gone: Callable[[_Waiting], bool]) -> None:
        with self._changed:
            waiting = [*self._queue, *filter(None, [self._current])]
        gone = {id(one) for one in waiting if is_gone(one)}
        with self._changed:
            kept = [one for one in self._queue if id(one) not in gone]
            self._bytes -= sum(one.record.num_bytes for one in self._queue if id(one) in gone)
            number = len(self._queue) - len(kept)
            self._queue = deque(kept)
            self._current_is_erased |= id(self._current) in gone
            self._changed.notify_all()
        for _ in range(number):
            self._count("erased")

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing waits, but no longer than `timeout_s`."""
        with self._changed:
            self._draining += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(
                    lambda: not self._queue and self._current is None, timeout_s
                )
            finally:
                self._draining -= 1

    def close(self, timeout_s: float) -> bool:
        """Take nothing more, write what waits, and end; ``False`` where the time was too short."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        give_way(_NICE)
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._queue or self._stopping,
                    _REMOVE_AGAIN_S if self._to_remove else _NOTE_USE_S,
                )
                while self._must_hold():
                    self._changed.wait(_LOOK_S)
                waiting = self._queue.popleft() if self._queue else None
                is_last = waiting is None and self._stopping
                self._current, self._current_is_erased = waiting, False
                self._current_is_done = False
            for key in list(self._to_remove):
                self._report(self._remove(key))
            if is_last:
                self._note_use()
                return
            if waiting is not None:
                kind, wrote = self._write(waiting)
                with self._changed:
                    # Counted as waiting until now: the memory is held until now.
                    self._bytes -= waiting.record.num_bytes
                    self._current_is_done = True
                self._report(kind, wrote)
                with self._changed:
                    self._current = None
                    self._changed.notify_all()
            if time.monotonic() - self._noted >= _NOTE_USE_S:
                self._note_use()

    def _must_hold(self) -> bool:
        """Whether the next record waits for a pause; under the lock."""
        if not self._queue or self._stopping or self._draining or self._to_remove:
            return False
        is_due = time.monotonic() - self._queue[0].since >= HOLD_S
        return not (is_due or 2 * self._bytes > self._queue_bytes or self._is_pause())

    def _note_use(self) -> None:
        since, self._noted = self._noted, time.monotonic()
        try:
            self.tier.used(self._used(since))
        except Exception as error:  # the thread goes on: only the order of eviction suffers
            self._say(error)

    def _write(self, waiting: _Waiting) -> tuple[str, tuple[int, float] | None]:
        """Write a record; return what to count, and its bytes and the seconds where the tier answered."""
        record, tenant = waiting.record, waiting.tenant
        kind, wrote = "write_failed", None
        try:
            if self._is_erased(record, tenant):
                return "erased", None
        except Exception as error:  # whoever does not know does not write
            self._say(error)
            return kind, None
        began = time.monotonic()
        try:
            put = self.tier.put(record, context=waiting.context, tenant=tenant)
            if put:
                self._note_group(waiting)
        except Exception as error:  # a thread that ends would drop everything unsaid
            self._say(error)
        else:
            kind = "written" if put else "no_room"
            wrote = record.num_bytes if put else 0, time.monotonic() - began
        # The text may have been erased meanwhile, by somebody who did not see this record yet. A tier that did not
        # answer may have written it all the same.
        if self._must_go(record, tenant):
            kind = self._remove(record.key)
        return kind, wrote

    def _note_group(self, waiting: _Waiting) -> None:
        group = self._group_of(waiting.context) if self.tier.has_groups else None
        if group is not None:
            try:
                self.tier.note_member(group, waiting.record.key)
            except Exception as error:  # the record is there; only by its group nobody finds it
                self._say(error)

    def _must_go(self, record: ChunkKV, tenant: str) -> bool:
        try:
            return self._current_is_erased or self._is_erased(record, tenant)
        except Exception as error:  # in doubt it goes
            self._say(error)
            return True

    def _remove(self, key: ChunkKey) -> str:
        """Remove what was written and erased meanwhile; what a tier refuses is tried again until it does not."""
        try:
            self.tier.remove(key)
        except Exception as error:
            self._to_remove.add(key)
            self._say(error)
            return "remove_failed"
        self._to_remove.discard(key)
        return "erased"

    def _say(self, error: Exception) -> None:
        told = error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(Exception):  # nor must the thread end because nobody listens
            self._failed(told)

    def _report(self, kind: str, wrote: tuple[int, float] | None = None) -> None:
        try:
            self._count(kind)
            if wrote is not None:
                self._wrote(*wrote)
        except Exception as error:
            self._say(error)
