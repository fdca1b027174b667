"""Makes records: one step at a time, behind the answers, each once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rag_pipeline.generation import Backend
from rag_pipeline.memory.plan import Chain


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildStats:
    """What building has cost so far.

    Attributes
    ----------
    steps, failed, skipped : int
        Steps that were run, that gave no record, and whose record was there already.
    forward_tokens : int
        Tokens that were computed, as the engine reports: blocks, probes, and whatever was missing.
    planned_tokens : int
        Tokens of the blocks and probes of these steps.
    probe_tokens : int
        Those of the probes among them.
    wall_s : float
        Seconds of the steps, waits for answers left out.
    peak_tokens : int
        Tokens of the longest prompt of a step.
    """

    steps: int = 0
    failed: int = 0
    skipped: int = 0
    forward_tokens: int = 0
    planned_tokens: int = 0
    probe_tokens: int = 0
    wall_s: float = 0.0
    peak_tokens: int = 0


class MemoryBuilder:
    """Runs the steps of chains on a backend, from one thread of its own.

    Steps of one record are run once, whoever asks for them. A chain is begun behind its newest step whose record is
    known to be there. A step that fails is counted, never raised. Safe for several threads.

    Parameters
    ----------
    backend : Backend
        Runs the requests; not closed here.
    existing : callable, optional
        Of memory ids, those whose records the engine has, in memory or a tier below; asked where nothing is known,
        for example after a restart.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        existing: Callable[[Sequence[str]], Collection[str]] | None = None,
    ) -> None:
        raise NotImplementedError

    def build(self, chain: Chain, *, urgent: bool = False) -> Future[bool]:
        """Queue a chain up to its last step; the result says whether its record is there then.

        Parameters
        ----------
        chain : Chain
            What to make.
        urgent : bool
            Whether somebody waits for it: it goes in front of the others, and does not wait for answers.
        """
        raise NotImplementedError

    def is_known(self, memory_id: str) -> bool:
        """Whether the record was there when it was last seen."""
        raise NotImplementedError

    def forget(self, memory_id: str) -> None:
        """Note that a record is gone, as an answer has reported."""
        raise NotImplementedError

    def answering(self) -> AbstractContextManager[None]:
        """Hold builds that nobody waits for while an answer is made."""
        raise NotImplementedError

    def finish(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is queued; whether that came in time."""
        raise NotImplementedError

    def stats(self) -> BuildStats:
        """What building has cost so far."""
        raise NotImplementedError

    def close(self) -> None:
        """Abort the step that runs and drop what is queued; a second call does nothing."""
        raise NotImplementedError
