"""Which turns of which conversation are stored, and which of them a prompt goes through."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from chunk_cache import ChunkKey, ChunkState, Match, MemoryStore, hash_token_ids
from rag_pipeline.sglang_plugin.fusion.runtime.fair_table import FairTable

TokenArray = npt.NDArray[np.int64]

_MAX_CONVERSATIONS = 1024
_MAX_TURNS = 256
"""Of one conversation, those that branch off among them."""
_MAX_BRANCHES = 8
"""Of one conversation, newest first, that are gone through for what a cut prompt holds."""
_MAX_PLACES = 8
"""Of one branch, at which what a cut prompt goes on with may have stood."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredTurn:
    """What one turn added: tokens ``[start, start + len(ids))`` of its prompt and answer.

    Attributes
    ----------
    start : int
        First position.
    ids : ndarray
        int64 token ids.
    before : str
        Hash of all tokens in front of ``start``.
    number, parent : int
        Of this turn, and of the one that it was computed behind; 0 for the exact prefix alone.
    key : ChunkKey
        Its record in the chunk store.
    exact : bool
        Plain prefill computed it, and all in front of it.
    """

    start: int
    ids: TokenArray
    before: str
    number: int
    parent: int
    key: ChunkKey
    exact: bool = False


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


class TurnTable:
    """Turns by namespace; of the tenant with most conversations the least recently used is forgotten first.

    Parameters
    ----------
    store : MemoryStore
        Holds the records; a turn whose record was evicted is forgotten with all behind it.
    """

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._spaces: FairTable[str, list[StoredTurn]] = FairTable()
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """Count the conversations."""
        return len(self._spaces)

    def clear(self) -> None:
        """Forget all conversations; their records are up to the store."""
        self._spaces.clear()

    def find(
        self, namespace: str, prompt: TokenArray, *, tenant: str = "", exact: bool = False
    ) -> list[tuple[StoredTurn, Match]]:
        """Longest chain of turns that the prompt goes through, each with the run of it that fits.

        Parameters
        ----------
        namespace : str
            Of the conversation.
        prompt : ndarray
            int64 token ids.
        tenant : str
            Whose conversation it is.
        exact : bool
            Only turns that plain prefill computed.
        """
        turns = self._alive(namespace, tenant)
        if exact:
            turns = [turn for turn in turns if turn.exact]
        if not turns:
            return []
        hashes: dict[int, str] = {}
        # Chain that ends in a turn, by its number; a parent always comes before its children.
        chains: dict[int, list[tuple[StoredTurn, Match]]] = {0: []}
        best: list[tuple[StoredTurn, Match]] = []
        for turn in turns:
            start = turn.start
            if turn.parent not in chains or start >= prompt.size:
                continue
            if prompt[start] != turn.ids[0]:
                continue
            if hashes.setdefault(start, hash_token_ids(prompt[:start])) != turn.before:
                continue
            run = prompt[start : start + turn.ids.size]
            differs = np.flatnonzero(run != turn.ids[: run.size])
            length = int(differs[0]) if differs.size else int(run.size)
            chain = list(chains[turn.parent])
            if chain:
                # A turn may have left the one before it early: its answer came back in other tokens.
                last, match = chain[-1]
                chain[-1] = (last, match.clipped(match.prompt_start, start))
            chain.append((turn, Match(start, start + length, turn.key)))
            chains[turn.number] = chain
            if not best or chain[-1][1].prompt_end > best[-1][1].prompt_end:
                best = chain
        return best

    def find_moved(
        self, namespace: str, prompt: TokenArray, *, tenant: str = "", at_least: int = 1
    ) -> MovedRun | None:
        """Longest run that the prompt goes on with where it leaves a branch of turns: what stood in between was cut.

        Parameters
        ----------
        namespace : str
            Of the conversation.
        prompt : ndarray
            int64 token ids.
        tenant : str
            Whose conversation it is.
        at_least : int
            Shortest run that is worth it, tokens.
        """
        best: MovedRun | None = None
        length = at_least - 1
        for path in itertools.islice(_branches(self._alive(namespace, tenant)), _MAX_BRANCHES):
            first, last = path[0], path[-1]
            if first.start >= prompt.size or hash_token_ids(prompt[: first.start]) != first.before:
                continue
            ends = [*(turn.start for turn in path[1:]), last.start + last.ids.size]
            content = np.concatenate(
                [turn.ids[: end - turn.start] for turn, end in zip(path, ends, strict=True)]
            )
            same = _same_length(prompt[first.start :], content)
            rest = prompt[first.start + same :]
            for place in _places_of(rest[:at_least], content, behind=same):
                found = _same_length(rest, content[place:])
                if found <= length:
                    continue
                length, distance = found, place - same
                low = first.start + place
                matches = [
                    Match(start - distance, end - distance, turn.key, start - turn.start)
                    for turn, turn_end in zip(path, ends, strict=True)
                    if (start := max(turn.start, low)) < (end := min(turn_end, low + found))
                ]
                best = MovedRun(number=last.number, distance=distance, matches=tuple(matches))
        return best

    def has_room(self, namespace: str, *, tenant: str = "") -> bool:
        """Whether a conversation may still grow."""
        return len(self._alive(namespace, tenant)) < _MAX_TURNS

    def add(
        self,
        namespace: str,
        ids: TokenArray,
        start: int,
        parent: int,
        key: ChunkKey,
        *,
        tenant: str = "",
        exact: bool = False,
    ) -> StoredTurn:
        """Remember a turn whose record is in the store."""
        turn = StoredTurn(
            start=start,
            ids=ids[start:].copy(),
            before=hash_token_ids(ids[:start]),
            number=next(self._numbers),
            parent=parent,
            key=key,
            exact=exact,
        )
        turns = [*(self._spaces.get(tenant, namespace) or ()), turn]
        for forgotten in self._spaces.put(tenant, namespace, turns, _MAX_CONVERSATIONS):
            for old in forgotten:
                self._store.evict(old.key)
        return turn

    def drop(self, namespace: str, *, tenant: str = "") -> None:
        """Forget a conversation, and evict its records."""
        for turn in self._spaces.get(tenant, namespace) or ():
            self._store.evict(turn.key)
        self._spaces.pop(tenant, namespace)

    def _alive(self, namespace: str, tenant: str) -> list[StoredTurn]:
        alive: list[StoredTurn] = []
        numbers = {0}
        for turn in self._spaces.get(tenant, namespace) or ():
            if turn.parent in numbers and self._store.state(turn.key) is ChunkState.READY:
                alive.append(turn)
                numbers.add(turn.number)
        if alive:
            self._spaces.put(tenant, namespace, alive, _MAX_CONVERSATIONS)
        else:
            self._spaces.pop(tenant, namespace)
        return alive


def _branches(turns: list[StoredTurn]) -> Iterator[list[StoredTurn]]:
    """Chains from a first turn to one that nothing was computed behind; the newest first."""
    by_number = {turn.number: turn for turn in turns}
    parents = {turn.parent for turn in turns}
    for last in reversed(turns):
        if last.number not in parents:
            path = [last]
            while path[0].parent:
                path.insert(0, by_number[path[0].parent])
            yield path


def _same_length(one: TokenArray, two: TokenArray) -> int:
    """Tokens that two runs begin with alike."""
    size = min(one.size, two.size)
    differs = np.flatnonzero(one[:size] != two[:size])
    return int(differs[0]) if differs.size else size


def _places_of(run: TokenArray, content: TokenArray, *, behind: int) -> list[int]:
    """Offsets past ``behind`` at which a run stands in the content; the first few."""
    last = content.size - run.size
    if not run.size or last <= behind:
        return []
    places = np.arange(behind + 1, last + 1)
    for step, token in enumerate(run):
        places = places[content[places + step] == token]
    found: list[int] = places[:_MAX_PLACES].tolist()
    return found
