"""One memory method on one conversation: its records are built, then it lays out the prompt of each question."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rag_eval.command import Progress
from rag_eval.conversation.config import is_episodic
from rag_eval.runner.session import EngineSession
from rag_pipeline.memory import Candidate, MemoryBuilder, Planner, Utterance

SYSTEM = (
    "You read a long conversation and then answer a question about it. "
    "Answer with a short phrase, in words of the conversation where possible."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Laid:
    """The prompt of a question, and what it took to lay it out.

    Parameters
    ----------
    candidate : Candidate
        The prompt, from the newest records.
    plan_s, plan_cpu_s : float
        Seconds of planning: embedding the question, choosing, joining token ids.
    """

    candidate: Candidate
    plan_s: float
    plan_cpu_s: float


class MethodRun:
    """A method's memory of one conversation.

    Parameters
    ----------
    session : EngineSession
        The engine.
    builder : MemoryBuilder
        Builds on the same engine; stays open.
    planner : Planner
        Of the method.
    history : sequence of Utterance
        The whole conversation.
    """

    def __init__(
        self,
        session: EngineSession,
        builder: MemoryBuilder,
        planner: Planner,
        history: Sequence[Utterance],
    ) -> None:
        self._session = session
        self._planner = planner
        self._history = list(history)
        self._builder = builder

    def build(self, progress: Progress) -> dict[str, Any]:
        """Make every record that is worth making, or prefill the history where the method answers from all of it.

        What the builder has made for a shorter history is not made again.

        Returns
        -------
        dict
            ``build_tokens`` (tokens that the engine computed), ``probe_tokens``, ``build_s``, ``build_cpu_s``,
            ``peak_tokens`` of a step, ``steps``, ``failed``, ``records`` and ``record_tokens`` that are kept for the
            answers, ``history_tokens``.
        """
        plan = self._planner.plan(SYSTEM, self._history, "?", max_new_tokens=1)
        before = self._builder.stats()
        cpu, began = self._session.cpu_seconds(), time.perf_counter()
        first = plan.candidates[0]
        found: dict[str, Any] = {"history_tokens": plan.history_tokens}
        chains = {chain.ids[-1]: chain for chain in (*plan.ahead, *first.chains) if len(chain)}
        for number, chain in enumerate(chains.values(), start=1):
            progress(f"building record {number} of {len(chains)}, {len(chain)} steps")
            self._builder.build(chain, urgent=True).result()
        prefilled = 0
        if not chains and _is_whole(first, plan.history_tokens):
            # What the radix tree of a server holds when the next question comes.
            ids = first.input_ids[: first.prefix_len + first.tail_len]
            self._session.prefill(ids)
            prefilled = len(ids)
        stats = self._builder.stats()
        return found | {
            "build_tokens": stats.forward_tokens - before.forward_tokens + prefilled,
            "probe_tokens": stats.probe_tokens - before.probe_tokens,
            "build_s": time.perf_counter() - began,
            "build_cpu_s": self._session.cpu_seconds() - cpu,
            "peak_tokens": max(stats.peak_tokens, prefilled),
            "steps": stats.steps - before.steps,
            "failed": stats.failed - before.failed,
            "records": len(chains),
            "record_tokens": sum(chain[-1].budget for chain in chains.values()),
        }

    def lay_out(self, question: str, *, max_new_tokens: int) -> Laid:
        """Plan the prompt of a question, and build what its records still lack."""
        cpu, began = time.process_time(), time.perf_counter()
        plan = self._planner.plan(SYSTEM, self._history, question, max_new_tokens=max_new_tokens)
        took, took_cpu = time.perf_counter() - began, time.process_time() - cpu
        candidate = plan.candidates[0]
        for chain in candidate.chains:
            self._builder.build(chain, urgent=True).result()
        return Laid(candidate=candidate, plan_s=took, plan_cpu_s=took_cpu)

    def in_episodes(self, places: Sequence[int], candidate: Candidate) -> float | None:
        """Share of utterances that lie in the episodes that a prompt answers from.

        Parameters
        ----------
        places : sequence of int
            Utterances that hold the evidence of its question.
        candidate : Candidate
            The prompt.

        Returns
        -------
        float or None
            None for a method without episodes, and where all of them stand behind the last whole segment.
        """
        if not candidate.episodes or not is_episodic(self._planner.config.method):
            return None
        labels = self._planner.episodes(SYSTEM, self._history)
        size = self._planner.config.segment_utterances
        segments = [at // size for at in places if at // size < len(labels)]
        if not segments:
            return None
        return sum(labels[one] in candidate.episodes for one in segments) / len(segments)


def _is_whole(candidate: Candidate, history_tokens: int) -> bool:
    """Whether the whole history stands in the prompt as it is."""
    return not candidate.slots and candidate.tail_len == history_tokens
