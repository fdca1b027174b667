"""A conversation's memory from end to end: plan, wait or not, answer, build ahead."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from rag_pipeline.errors import one_line
from rag_pipeline.memory.builder import MemoryBuilder, StepBackend
from rag_pipeline.memory.stats import MemoryStats
from rag_pipeline.protocol import SamplingOptions, fusion_report, memory_report, usage_from_meta

if TYPE_CHECKING:
    from rag_pipeline.memory.plan import Candidate, Chain, MemoryPlan, Utterance
    from rag_pipeline.memory.planner import Planner
    from rag_pipeline.protocol import GenerationRequest

logger = logging.getLogger(__name__)

_PLANNED = 64
"""Histories that wait to be planned ahead, each held whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The prompt that an answer is made from.

    Parameters
    ----------
    request : GenerationRequest
        For the backend.
    candidate : Candidate
        Its layout.
    plan : MemoryPlan
        Whole plan.
    """

    request: GenerationRequest
    candidate: Candidate
    plan: MemoryPlan


class Memory:
    """Answers questions of long conversations from records of a fixed size.

    Use it in this order, per turn::

        with memory.answering():
            prepared = memory.prepare(system, history, question)
            ... backend.generate(prepared.request) ...
            memory.note(prepared, meta_info)
        memory.after(system, [*history, Utterance("user", question), Utterance("assistant", answer)])

    One memory serves any number of conversations of one tenant. Safe for several threads and tasks.

    Parameters
    ----------
    planner : Planner
        Lays out prompts.
    backend : StepBackend
        Runs the builds; not closed here.
    existing : callable, optional
        See :class:`~rag_pipeline.memory.builder.MemoryBuilder`.
    """

    def __init__(
        self,
        planner: Planner,
        backend: StepBackend,
        *,
        existing: Callable[[Sequence[str]], Collection[str]] | None = None,
    ) -> None:
        self.planner = planner
        self.builder = MemoryBuilder(backend, existing=existing)
        self._counts: Counter[str] = Counter()
        self._peak = self._planned = 0
        self._lock = threading.Lock()
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="memory-plans")

    def prepare(
        self,
        system: str,
        history: Sequence[Utterance],
        question: str,
        *,
        sampling: SamplingOptions | None = None,
        wait: bool = False,
        query: str = "",
    ) -> Prepared:
        """Lay out the prompt of an answer, and queue what is worth building.

        Parameters
        ----------
        system, history, question : str, sequence of Utterance, str
            As for :meth:`.Planner.plan`.
        sampling : SamplingOptions, optional
            How it is decoded; its `max_new_tokens` are left room for.
        wait : bool
            Build the newest record first instead of answering from what is there.
        query : str
            As for :meth:`.Planner.plan`.

        Raises
        ------
        RagPipelineError
            As :meth:`.Planner.plan` does. A build that fails is none: the prompt is then a sliding window.
        """
        sampling = sampling or SamplingOptions()
        plan = self.planner.plan(
            system, history, question, max_new_tokens=sampling.max_new_tokens, query=query
        )
        if wait:
            self.build_newest(plan)
        return self.prepare_planned(plan, sampling)

    def build_newest(self, plan: MemoryPlan) -> None:
        """Wait until the records of a plan's first candidate are built; one that fails is none."""
        self.build_now(plan.candidates[0].chains)

    def build_now(self, chains: Sequence[Chain]) -> None:
        """Wait until these are built, before any that nobody waits for; one that fails is none."""
        for job in [self.builder.build(one, urgent=True) for one in chains]:
            job.result()

    def prepare_planned(self, plan: MemoryPlan, sampling: SamplingOptions) -> Prepared:
        """Choose the prompt of an answer from a plan, as :meth:`prepare` does, and queue what is worth building.

        Parameters
        ----------
        plan : MemoryPlan
            By :attr:`planner`, with room for an answer of `sampling`.
        sampling : SamplingOptions
            How it is decoded.
        """
        candidate = self._choose(plan)
        kind = "" if candidate.needs else "window" if plan.candidates[0].needs else "plain"
        with self._lock:
            self._counts.update(answers=1, **({kind: 1} if kind else {}))
            self._peak = max(self._peak, len(candidate.input_ids))
        self._queue(plan.ahead)
        return Prepared(request=candidate.request(sampling), candidate=candidate, plan=plan)

    def note(self, prepared: Prepared, meta_info: Mapping[str, Any]) -> None:
        """Take in what the engine reported on the answer; a record that was gone is built again.

        Parameters
        ----------
        prepared : Prepared
            What the answer was made from.
        meta_info : mapping
            The engine's report, of all pieces together.
        """
        candidate = prepared.candidate
        usage = usage_from_meta(meta_info, prompt_tokens=len(candidate.input_ids))
        counts = {"forward_tokens": usage.fresh_tokens + usage.recomputed_tokens}
        if candidate.needs:
            loaded = bool(memory_report(fusion_report(meta_info)).get("loaded"))
            counts["loaded" if loaded else "missed"] = 1
            known = self.builder.records
            for one in candidate.needs:
                (known.note if loaded else known.forget)(one)
            if not loaded:
                self._queue(candidate.chains)
        with self._lock:
            self._counts.update(counts)

    def after(self, system: str, history: Sequence[Utterance]) -> None:
        """Build ahead in the background; returns at once, and raises nothing for a history that cannot be planned.

        Where many histories wait for that, this one is left out: the next turn brings it again.
        """
        with self._lock:
            if self._planned >= _PLANNED:
                return
            self._planned += 1
        try:
            self._planning.submit(self._plan_ahead, system, list(history))
        except RuntimeError:  # closed
            return

    def answering(self) -> AbstractContextManager[None]:
        """Context manager around an answer: builds that nobody waits for stand still."""
        return self.builder.answering()

    def finish(self, timeout_s: float | None = None) -> bool:
        """Wait until everything that was asked for is built; whether that came in time."""
        try:
            self._planning.submit(int).result(timeout_s)
        except TimeoutError:
            return False
        return self.builder.finish(timeout_s)

    def stats(self) -> MemoryStats:
        """Counts so far."""
        with self._lock:
            counts, peak = dict(self._counts), self._peak
        names = ("answers", "loaded", "missed", "plain", "window", "forward_tokens")
        return MemoryStats(
            **{name: counts.get(name, 0) for name in names},
            peak_tokens=peak,
            build=self.builder.stats(),
        )

    def close(self, *, wait: bool = True) -> None:
        """End the builds; the backend runs on. Without `wait` a step that runs ends later. A second call does nothing."""
        self._planning.shutdown(wait=False, cancel_futures=True)
        self.builder.close(wait=wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _choose(self, plan: MemoryPlan) -> Candidate:
        """Return the first candidate whose records are there."""
        records = self.builder.records
        for candidate in plan.candidates:
            if all(map(records.is_known, candidate.needs)):
                return candidate
        if not records.can_ask:
            # A record may be there from before a restart. If not, the engine makes a window of the same prompt.
            return min(plan.candidates, key=lambda one: len(one.needs))
        there = records.find([one for candidate in plan.candidates for one in candidate.needs])
        for candidate in plan.candidates:
            if there.issuperset(candidate.needs):
                return candidate
        return plan.fallback

    def _plan_ahead(self, system: str, history: Sequence[Utterance]) -> None:
        with self._lock:
            self._planned -= 1
        try:
            self._queue(self.planner.ahead(system, history))
        except Exception as error:
            logger.warning("a conversation's memory was not planned: %s", one_line(error, 300))

    def _queue(self, chains: Sequence[Chain]) -> None:
        for chain in chains:
            self.builder.build(chain)
