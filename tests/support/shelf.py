"""The simplest tier below memory: a dictionary, for tests to spoil, to slow down or to watch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from chunk_cache import ChunkKey, ChunkKV, Tier


class Shelf(Tier):
    """Records by key, of this process alone."""

    def __init__(self) -> None:
        self.records: dict[ChunkKey, ChunkKV] = {}

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> Self:
        return cls()

    def contains(self, key: ChunkKey) -> bool:
        return key in self.records

    def read(self, key: ChunkKey) -> ChunkKV | None:
        return self.records.get(key)

    def put(self, record: ChunkKV, *, context: Any = None, tenant: Any = None) -> bool:
        self.records[record.key] = record
        return True

    def remove(self, key: ChunkKey) -> bool:
        return self.records.pop(key, None) is not None

    def keys(self) -> Iterator[ChunkKey]:
        return iter(list(self.records))
