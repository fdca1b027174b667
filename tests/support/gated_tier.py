"""A memory store above two tiers whose records are read layer by layer, each when the test lets it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from shelf import Shelf

from chunk_cache import (
    Candidate,
    ChunkKey,
    ChunkKV,
    Fetcher,
    KVContext,
    MemoryStore,
    RecordForm,
    TierChain,
    Timeline,
)
from rag_eval.slow_reader import SlowReader

Make = Callable[..., ChunkKV]
LAYERS = 4


class GatedReader(SlowReader):
    """A record of which a layer is read when the test lets it, and whose end the test hears of."""

    def __init__(self, tier: GatedTier, record: ChunkKV) -> None:
        super().__init__(record, lambda index: tier.wait_for(record.key, index))
        self.close = lambda: tier.closed.append(record.key)


class GatedTier(Shelf):
    """A shelf whose records are read layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.asked: list[tuple[ChunkKey, int]] = []
        self.closed: list[ChunkKey] = []
        self.fault: Exception | None = None
        self.fault_at = 1

    def open(self, key: ChunkKey, token_ids: Any) -> GatedReader | None:
        record = self.get(key, token_ids)
        return None if record is None else GatedReader(self, record)

    def wait_for(self, key: ChunkKey, layer: int) -> None:
        self.asked.append((key, layer))
        assert self.gate.acquire(timeout=60)
        if self.fault is not None and layer == self.fault_at:
            raise self.fault


class World:
    """A memory store above two tiers, and one thread that fetches."""

    def __init__(self, make_record: Make, context: KVContext) -> None:
        self.near, self.far = GatedTier(), GatedTier()
        self.store = MemoryStore(10**6)
        self.counts: Counter[str] = Counter()
        self.erased: set[ChunkKey] = set()
        self.timeline = Timeline()
        self.context = context
        self.make_record = make_record
        self.chain = TierChain({"near": self.near, "far": self.far})
        self.fetcher = Fetcher(
            self.chain,
            self.store,
            RecordForm.of(self.record(99)),
            count=lambda tier, kind: self.counts.update([f"{tier}.{kind}"]),
            is_erased=lambda record, tenant: record.key in self.erased,
            timeline=lambda: self.timeline,
            threads=1,
            patience_s=30.0,
        )

    def record(self, start: int, **options: Any) -> ChunkKV:
        return self.make_record(range(start, start + 8), layers=LAYERS, **options)

    def stored(self, start: int) -> ChunkKV:
        record = self.record(start)
        self.far.records[record.key] = record
        return record

    def wanted(self, *records: ChunkKV) -> list[list[Candidate]]:
        return [[Candidate(r.key, r.token_ids, self.context, "")] for r in records]

    def begin(self, *records: ChunkKV) -> list[Any]:
        fetches = self.fetcher.begin(self.wanted(*records))
        assert self.fetcher.wait(lambda: all(f.has_header for f in fetches), 60)
        return fetches

    def let(self, layers: int) -> None:
        self.far.gate.release(layers)
