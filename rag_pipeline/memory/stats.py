"""What a memory has done and what its records have cost, in counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildStats:
    """What building has cost so far.

    Attributes
    ----------
    steps, failed, lost : int
        Steps that were run; those among them that gave no record; those whose record before was gone.
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
    lost: int = 0
    forward_tokens: int = 0
    planned_tokens: int = 0
    probe_tokens: int = 0
    wall_s: float = 0.0
    peak_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryStats:
    """Counts since the memory was made.

    Attributes
    ----------
    answers : int
        Prompts that were prepared.
    loaded, missed, plain, window : int
        How they came out: from a record, with a record that was gone, without a memory because the history is short or the
        method has none, and with a sliding window because nothing was built yet.
    forward_tokens : int
        Tokens of the prompts that were computed, of the answers that were noted.
    peak_tokens : int
        Tokens of the longest prompt of an answer.
    build : BuildStats
        What the records have cost.
    """

    answers: int
    loaded: int
    missed: int
    plain: int
    window: int
    forward_tokens: int
    peak_tokens: int
    build: BuildStats

    def to_json(self) -> dict[str, Any]:
        """One object, `build` nested."""
        return asdict(self)

    def to_flat_json(self) -> dict[str, Any]:
        """The same on one level: the names of `build` begin with ``build_``."""
        facts = self.to_json()
        build = facts.pop("build")
        return facts | {f"build_{name}": value for name, value in build.items()}
