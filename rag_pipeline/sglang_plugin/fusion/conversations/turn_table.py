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
_MAX_SEGMENTS = 256
"""Of one conversation: turns and what branches off them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
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
        Of this segment, and of the one that it was computed behind; 0 for the exact prefix alone.
    key : ChunkKey
        Its record in the chunk store.
    """

    start: int
    ids: TokenArray
    before: str
    number: int
    parent: int
    key: ChunkKey


class Conversations:
    """Segments by namespace; of the tenant with most conversations the least recently used is forgotten first.

    Parameters
    ----------
    store : MemoryStore
        Holds the records; a segment whose record was evicted is forgotten with all behind it.
    """

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._spaces: FairTable[str, list[Segment]] = FairTable()
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """Count the conversations."""
        return len(self._spaces)

    def find(
        self, namespace: str, prompt: TokenArray, *, tenant: str = ""
    ) -> list[tuple[Segment, Match]]:
        """Longest chain of segments that the prompt goes through, each with the run of it that fits."""
        segments = self._alive(namespace, tenant)
        if not segments:
            return []
        hashes: dict[int, str] = {}
        # Chain that ends in a segment, by its number; a parent always comes before its children.
        chains: dict[int, list[tuple[Segment, Match]]] = {0: []}
        best: list[tuple[Segment, Match]] = []
        for segment in segments:
            start = segment.start
            if segment.parent not in chains or start >= prompt.size:
                continue
            if prompt[start] != segment.ids[0]:
                continue
            if hashes.setdefault(start, hash_token_ids(prompt[:start])) != segment.before:
                continue
            run = prompt[start : start + segment.ids.size]
            differs = np.flatnonzero(run != segment.ids[: run.size])
            length = int(differs[0]) if differs.size else int(run.size)
            chain = list(chains[segment.parent])
            if chain:
                # A turn may have left the one before it early: its answer came back in other tokens.
                last, match = chain[-1]
                chain[-1] = (last, match.clipped(match.prompt_start, start))
            chain.append((segment, Match(start, start + length, segment.key)))
            chains[segment.number] = chain
            if not best or chain[-1][1].prompt_end > best[-1][1].prompt_end:
                best = chain
        return best

    def has_room(self, namespace: str, *, tenant: str = "") -> bool:
        """Whether a conversation may still grow."""
        return len(self._alive(namespace, tenant)) < _MAX_SEGMENTS

    def add(
        self,
        namespace: str,
        ids: TokenArray,
        start: int,
        parent: int,
        key: ChunkKey,
        *,
        tenant: str = "",
    ) -> Segment:
        """Remember a segment whose record is in the store."""
        segment = Segment(
            start=start,
            ids=ids[start:].copy(),
            before=hash_token_ids(ids[:start]),
            number=next(self._numbers),
            parent=parent,
            key=key,
        )
        segments = [*(self._spaces.get(tenant, namespace) or ()), segment]
        for forgotten in self._spaces.put(tenant, namespace, segments, _MAX_CONVERSATIONS):
            for old in forgotten:
                self._store.evict(old.key)
        return segment

    def _alive(self, namespace: str, tenant: str) -> list[Segment]:
        alive: list[Segment] = []
        numbers = {0}
        for segment in self._spaces.get(tenant, namespace) or ():
            if segment.parent in numbers and self._store.state(segment.key) is ChunkState.READY:
                alive.append(segment)
                numbers.add(segment.number)
        if alive:
            self._spaces.put(tenant, namespace, alive, _MAX_CONVERSATIONS)
        else:
            self._spaces.pop(tenant, namespace)
        return alive
