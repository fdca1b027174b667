"""Which turns of which conversation are stored, and which of them a prompt goes through."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from chunk_cache import ChunkKey, ChunkState, Match, MemoryStore, hash_token_ids
from rag_pipeline.sglang_plugin.fusion.runtime.fair_table import FairTable

TokenArray = npt.NDArray[np.int64]

_MAX_CONVERSATIONS = 1024
_MAX_TURNS = 256
"""Of one conversation, those that branch off among them."""


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
    """

    start: int
    ids: TokenArray
    before: str
    number: int
    parent: int
    key: ChunkKey


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
        self, namespace: str, prompt: TokenArray, *, tenant: str = ""
    ) -> list[tuple[StoredTurn, Match]]:
        """Longest chain of turns that the prompt goes through, each with the run of it that fits."""
        turns = self._alive(namespace, tenant)
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
    ) -> StoredTurn:
        """Remember a turn whose record is in the store."""
        turn = StoredTurn(
            start=start,
            ids=ids[start:].copy(),
            before=hash_token_ids(ids[:start]),
            number=next(self._numbers),
            parent=parent,
            key=key,
        )
        turns = [*(self._spaces.get(tenant, namespace) or ()), turn]
        for forgotten in self._spaces.put(tenant, namespace, turns, _MAX_CONVERSATIONS):
            for old in forgotten:
                self._store.evict(old.key)
        return turn

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
