"""What one request does with a conversation's memory: what it loaded, and what it is to leave."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from chunk_cache import ChunkKey, KVContext, TokenIds
from chunk_cache.retention import RetentionRule


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MemoryTarget:
    """The record that a request leaves.

    Attributes
    ----------
    name : str
        Its memory id.
    key : ChunkKey
        Of the record on this rank.
    context : KVContext
        Of the key.
    token_ids : ndarray
        int32 ``[M]``: the last tokens of the history that it has seen.
    owner : str
        Whose it is (:func:`chunk_cache.tenant_mark`).
    rule : RetentionRule
        Scores the keys.
    start, end : int
        Prompt positions whose keys compete.
    first_query, last_query : int
        Prompt positions ``[first, last)`` whose queries score; empty for a rule that asks for none.
    own : tuple of (int, int)
        Spans of true positions whose tokens stay before others.
    free : int
        Slots that scores alone decide where there are own spans.
    """

    name: str
    key: ChunkKey
    context: KVContext
    token_ids: TokenIds
    owner: str
    rule: RetentionRule
    start: int
    end: int
    first_query: int
    last_query: int
    own: tuple[tuple[int, int], ...] = ()
    free: int = 0


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class MemoryWork:
    """Of one scheduling attempt; each begins with a new one.

    Attributes
    ----------
    loaded : int
        Slots that are loaded.
    is_missed : bool
        A record was asked for and is not loaded: its slots are prefilled as a sliding window.
    delta : int
        Prompt position minus true position, of the slots and of all behind them; 0 or below.
    target : MemoryTarget or None
        What is to be stored; None for nothing.
    name : str
        Memory id of what was stored, or is there already; empty for nothing.
    kept : int
        Slots of that record.
    shares : list of float
        Kept share of each span that was asked about.
    """

    loaded: int = 0
    is_missed: bool = False
    delta: int = 0
    target: MemoryTarget | None = None
    name: str = ""
    kept: int = 0
    shares: list[float] = dataclasses.field(default_factory=list)
    _queries: dict[int, list[Tensor]] = dataclasses.field(default_factory=dict)

    def note_queries(self, layer: int, queries: Tensor) -> None:
        """Keep rotated queries ``[R, Q, D]`` of the next rows that score; pieces of a prompt come in order."""
        self._queries.setdefault(layer, []).append(queries)

    def queries_of(self, layer: int) -> list[Tensor]:
        """What was kept of a layer, in order."""
        return self._queries.get(layer, [])

    def store_nothing(self) -> None:
        """Leave no record."""
        self.target = None
        self._queries.clear()

    def lose_load(self) -> None:
        """Note that what was to be loaded is computed after all; a record must not be made of that."""
        self.is_missed = self.is_missed or bool(self.loaded)
        self.loaded, self.shares = 0, []
        self.store_nothing()
