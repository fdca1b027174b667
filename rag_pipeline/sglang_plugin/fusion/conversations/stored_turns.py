"""One stored turn, and the pure functions by which a prompt is laid over stored turns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from chunk_cache import ChunkKey, KVContext, Match, hash_token_ids
from rag_pipeline.sglang_plugin.fusion.conversations.lineage import Lineage

TokenArray = npt.NDArray[np.int64]

_MAX_PLACES = 8
"""Of one branch, at which what a cut prompt goes on with may have stood."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredTurn:
    """What one turn added: tokens ``[start, end)`` of its prompt and answer.

    Attributes
    ----------
    lineage : Lineage
        What it was computed behind.
    ids : ndarray
        int64 token ids.
    key : ChunkKey
        Its record in the chunk store.
    context : KVContext or None
        Of the key; None as long as only a tier has told that the key is that of this turn.
    """

    lineage: Lineage
    ids: TokenArray
    key: ChunkKey
    context: KVContext | None = None

    @property
    def start(self) -> int:
        """First position."""
        return self.lineage.start

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + int(self.ids.size)

    @property
    def before(self) -> str:
        """Hash of all tokens in front of it."""
        return self.lineage.before

    @functools.cached_property
    def number(self) -> int:
        """Of this turn: the same wherever and whenever it is computed."""
        return self.lineage.number(self.ids)

    @property
    def parent(self) -> int:
        """Number of the turn that it was computed behind; 0 for the exact prefix alone."""
        return self.lineage.parent

    @property
    def exact(self) -> bool:
        """Plain prefill computed it, and all in front of it."""
        return self.lineage.is_exact


Chain = list[tuple[StoredTurn, Match]]
"""Turns that a prompt goes through, each with the run of it that fits; rising, disjoint."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MovedRun:
    """Part of the turns that a prompt goes through at a smaller position than theirs.

    Attributes
    ----------
    number : int
        Of the last turn of the branch that they are of.
    distance : int
        Old position minus the new one, tokens; positive.
    matches : tuple of Match
        In prompt order, each touching the next.
    """

    number: int
    distance: int
    matches: tuple[Match, ...]


def run_of(turn: StoredTurn, prompt: TokenArray, hashes: dict[int, str]) -> Match | None:
    """Part of a turn that a prompt goes through behind the very tokens that stood in front of it."""
    start = turn.start
    if start >= prompt.size or prompt[start] != turn.ids[0]:
        return None
    if start not in hashes:
        hashes[start] = hash_token_ids(prompt[:start])
    if hashes[start] != turn.before:
        return None
    return Match(start, start + same_length(prompt[start:], turn.ids), turn.key)


def cut_at(chain: Chain, end: int) -> Chain:
    """Part of a chain in front of a position: a turn may have left the one before it early."""
    return [(turn, m.clipped(m.prompt_start, end)) for turn, m in chain if m.prompt_start < end]


def disjoint(chain: Chain) -> Chain:
    """Runs in the order of the prompt, each without what an earlier one holds."""
    found: Chain = []
    at = 0
    for turn, match in sorted(chain, key=lambda one: (one[1].prompt_start, -one[1].prompt_end)):
        if match.prompt_end > at:
            found.append((turn, match.clipped(at, match.prompt_end)))
            at = match.prompt_end
    return found


def num_tokens(chain: Chain) -> int:
    """Tokens of all runs."""
    return sum(match.num_tokens for _, match in chain)


def branches(turns: list[StoredTurn]) -> Iterator[list[StoredTurn]]:
    """Chains from a first turn to one that nothing was computed behind; the newest first."""
    by_number = {turn.number: turn for turn in turns}
    parents = {turn.parent for turn in turns}
    for last in reversed(turns):
        if last.number not in parents:
            path = [last]
            while path[0].parent in by_number:
                path.insert(0, by_number[path[0].parent])
            yield path


def same_length(one: TokenArray, two: TokenArray) -> int:
    """Tokens that two runs begin with alike."""
    size = min(one.size, two.size)
    differs = np.flatnonzero(one[:size] != two[:size])
    return int(differs[0]) if differs.size else size


def places_of(run: TokenArray, content: TokenArray, *, behind: int) -> list[int]:
    """Offsets past ``behind`` at which a run stands in the content; the first few."""
    last = content.size - run.size
    if not run.size or last <= behind:
        return []
    places = np.arange(behind + 1, last + 1)
    for step, token in enumerate(run):
        places = places[content[places + step] == token]
    found: list[int] = places[:_MAX_PLACES].tolist()
    return found
