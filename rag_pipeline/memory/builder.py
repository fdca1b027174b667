"""Makes records: one step at a time, behind the answers, each once."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from rag_pipeline.errors import one_line
from rag_pipeline.memory.bounded import BoundedTable
from rag_pipeline.memory.known import KnownRecords
from rag_pipeline.memory.stats import BuildStats
from rag_pipeline.protocol import fusion_report, memory_report, usage_from_meta

if TYPE_CHECKING:
    from rag_pipeline.memory.plan import Chain, Step
    from rag_pipeline.protocol import GenerationPiece, GenerationRequest

logger = logging.getLogger(__name__)

_FAILURES = 65_536
"""Steps whose failures are remembered."""
_QUEUED = 1024
"""Chains that wait in the background; the oldest is dropped for another."""
_TRIES = 3
"""Attempts at one step, and new beginnings of one chain whose records go while it is made."""
_CHEAP = 2
"""Steps that are missing from which on the engine is asked first: one step alone it notices by itself."""
_CLOSE_S = 60.0
"""Longest wait at the end for the step that runs."""
_REST_S = 60.0
"""How long a step that has failed in each attempt is left alone, seconds."""


class StepBackend(Protocol):
    """The part of :class:`rag_pipeline.generation.Backend` that building needs."""

    def generate(self, request: GenerationRequest) -> Generator[GenerationPiece, None, None]:
        """Yield pieces as they come; closing the generator aborts the request."""
        ...


@dataclass(kw_only=True, slots=True)
class _Job:
    chain: Chain
    urgent: bool
    done: Future[bool]
    asked: bool = False
    lost: int = 0


class MemoryBuilder:
    """Runs the steps of chains on a backend, from one thread of its own.

    One step runs at a time, so whoever asks for a record that is being made waits for it and makes none. A chain is begun
    behind its newest step whose record is known to be there. A step that fails is counted, never raised. Safe for several
    threads. Tenants' records are apart: use one builder per tenant.

    Parameters
    ----------
    backend : StepBackend
        Runs the requests; not closed here.
    existing : callable, optional
        Of memory ids, those whose records the engine has, in memory or a tier below; asked where nothing is known,
        for example after a restart. It may raise: nothing exists then.

    Attributes
    ----------
    records : KnownRecords
        What is known of the records that are there.
    """

    def __init__(
        self,
        backend: StepBackend,
        *,
        existing: Callable[[Sequence[str]], Collection[str]] | None = None,
    ) -> None:
        self._backend = backend
        self.records = KnownRecords(existing)
        self._failures: BoundedTable[str, tuple[int, float]] = BoundedTable(_FAILURES)
        self._state = threading.Condition()
        self._urgent: deque[_Job] = deque()
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._answers = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        self._stats = BuildStats()

    def build(self, chain: Chain, *, urgent: bool = False) -> Future[bool]:
        """Queue a chain up to its last step; the result says whether its record is there then.

        Parameters
        ----------
        chain : Chain
            What to make.
        urgent : bool
            Whether somebody waits for it: it goes in front of the others, and does not wait for answers.
        """
        job = _Job(chain=chain, urgent=urgent, done=Future())
        # Several may wait for it: one that goes away must not cancel it for the others.
        job.done.set_running_or_notify_cancel()
        wanted = chain.ids[-1]
        if self.records.is_known(wanted):
            _resolve(job, True)
            return job.done
        with self._state:
            if self._closed:
                _resolve(job, False)
                return job.done
            queue = self._urgent if urgent else self._waiting
            twin = next((other for other in queue if other.chain.ids[-1] == wanted), None)
            if twin is not None:
                return twin.done
            queue.append(job)
            if len(queue) > _QUEUED:
                _resolve(queue.popleft(), False)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="memory-builds", daemon=True
                )
                self._thread.start()
            self._state.notify_all()
        return job.done

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Hold builds that nobody waits for while an answer is made; a step that runs goes on."""
        with self._state:
            self._answers += 1
        try:
            yield
        finally:
            with self._state:
                self._answers -= 1
                self._state.notify_all()

    def finish(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is queued; whether that came in time."""
        with self._state:
            return self._state.wait_for(
                lambda: not (self._urgent or self._waiting or self._running), timeout_s
            )

    def stats(self) -> BuildStats:
        """What building has cost so far."""
        with self._state:
            return self._stats

    def close(self, *, wait: bool = True) -> None:
        """Abort the step that runs, without `wait` not before it gives way, and drop what is queued; may be called again."""
        with self._state:
            self._closed = True
            dropped = [*self._urgent, *self._waiting]
            self._urgent.clear()
            self._waiting.clear()
            self._state.notify_all()
            thread = self._thread
        for job in dropped:
            _resolve(job, False)
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_S)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                made = self._advance(job)
            except Exception as error:
                # One of others' code: a memory is never an error to who asks.
                logger.warning("a conversation's memory was not built: %s", one_line(error, 300))
                made = False
            with self._state:
                self._running = None
                if made is None and not self._closed:
                    (self._urgent if job.urgent else self._waiting).appendleft(job)
                self._state.notify_all()
            if made is not None or self._closed:
                _resolve(job, bool(made))

    def _next(self) -> _Job | None:
        """Wait for the next job; None when closed."""
        with self._state:
            while not self._closed:
                if self._urgent:
                    self._running = self._urgent.popleft()
                    return self._running
                if self._waiting and not self._answers:
                    self._running = self._waiting.popleft()
                    return self._running
                self._state.wait()
        return None

    def _advance(self, job: _Job) -> bool | None:
        """Run the next step of a chain; whether its record is there, or None while there is more to do."""
        ids = job.chain.ids
        newest = self.records.newest(ids)
        if not job.asked and len(ids) - newest > _CHEAP and self.records.can_ask:
            job.asked = True
            self.records.ask_backwards(ids[newest + 1 :])
            newest = self.records.newest(ids)
        if newest == len(ids) - 1:
            return True
        step = job.chain[newest + 1]
        if self._rests(step.id) or job.lost >= _TRIES:
            return False
        try:
            made = self._run(step)
        except Exception as error:
            if self._closed:
                return False
            logger.warning(
                "a step of a conversation's memory failed; answers use a window instead: %s",
                one_line(error, 300),
            )
            self._count(failed=1)
            made = False
        if made is None:
            # Others of the chain may be gone with it, and each that is tried costs the prefill of its slots.
            job.lost, job.asked = job.lost + 1, False
            self.records.unlearn(ids)
            for one in ids if job.lost > 1 else (step.previous,):
                self.records.forget(one)
            return None
        if not made:
            failures, _ = self._failures.get(step.id) or (0, 0.0)
            self._failures.put(step.id, (failures + 1, time.monotonic()))
            return False
        self.records.note(step.id)
        return True if newest + 1 == len(ids) - 1 else None

    def _rests(self, memory_id: str) -> bool:
        """Whether a step has failed so often and so lately that it is not tried."""
        failures, last = self._failures.get(memory_id) or (0, 0.0)
        if failures < _TRIES:
            return False
        if time.monotonic() - last < _REST_S:
            return True
        # All later steps of its conversation stand behind it, so it is not given up for good.
        self._failures.drop(memory_id)
        return False

    def _run(self, step: Step) -> bool | None:
        """Whether the step left its record; None where the record before was gone."""
        request = step.request()
        started = time.perf_counter()
        meta: dict[str, Any] = {}
        with closing(self._backend.generate(request)) as pieces:
            for piece in pieces:
                meta.update(piece.meta_info)
                if self._closed:
                    return False
        usage = usage_from_meta(meta, prompt_tokens=len(request.input_ids))
        report = memory_report(fusion_report(meta))
        lost = bool(report.get("missed")) and bool(step.previous)
        stored = bool(report.get("stored")) and report.get("id") == step.id
        self._count(
            steps=1,
            failed=int(not stored and not lost),
            lost=int(lost),
            forward_tokens=usage.fresh_tokens + usage.recomputed_tokens,
            planned_tokens=step.forward_tokens,
            probe_tokens=len(step.probe_ids),
            wall_s=time.perf_counter() - started,
            peak_tokens=step.peak_tokens,
        )
        if stored:
            return True
        return None if lost else False

    def _count(self, *, peak_tokens: int = 0, **more: float) -> None:
        with self._state:
            known = self._stats
            sums = {name: getattr(known, name) + value for name, value in more.items()}
            self._stats = replace(known, peak_tokens=max(known.peak_tokens, peak_tokens), **sums)


def _resolve(job: _Job, made: bool) -> None:
    with suppress(InvalidStateError):  # nobody waits any more
        job.done.set_result(made)
