"""What is fetched: the records that would serve a request, and one chunk on its way into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from chunk_cache.keys import ChunkKey, KVContext, TokenIds
from chunk_cache.store.builds import Build
from chunk_cache.store.loading import LoadingChunk, Patience
from chunk_cache.tiers.base import LayerReader


class Candidate(NamedTuple):
    """A record that would serve a request."""

    key: ChunkKey
    token_ids: TokenIds
    context: KVContext
    """Of its namespace."""
    tenant: str
    """Whose share of memory it takes (:func:`~chunk_cache.tenant_mark`)."""


class Fetch:
    """One chunk on its way; shared by the requests that want it meanwhile."""

    __slots__ = (
        "build",
        "cancelled",
        "candidates",
        "chosen",
        "is_ended",
        "layer_s",
        "loading",
        "patience",
        "reader",
        "tier",
    )

    def __init__(self, candidates: Sequence[Candidate], patience: Patience) -> None:
        self.candidates = list(candidates)
        self.patience = patience
        self.chosen: Candidate | None = None
        self.tier = ""
        self.reader: LayerReader | None = None
        self.build: Build | None = None
        self.loading: LoadingChunk | None = None
        self.cancelled = ""
        """Why nothing of it may come into memory any more: ``cancelled`` or ``erased``; empty while it may."""
        self.is_ended = False
        self.layer_s = 0.0
        """Seconds per layer of what was read last; 0 before."""

    @property
    def has_header(self) -> bool:
        """Whether waiting for the header is over: it is there, or will not come."""
        return self.is_ended or self.loading is not None

    def has_layers(self, number: int) -> bool:
        """Whether so many layers are there, or no more will come."""
        loading = self.loading
        if self.is_ended:
            return True
        return loading is not None and loading.num_filled >= min(number, loading.num_layers)
