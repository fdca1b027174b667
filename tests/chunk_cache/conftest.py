"""Shared by the chunk-cache tests: contexts, records of random KV, and stores checked at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gated_tier import Make, World
from valkey_server import Server

from chunk_cache import ChunkKey, ChunkKV, KVContext, MemoryStore


@pytest.fixture
def context() -> KVContext:
    return KVContext(
        model_fingerprint="tiny-1",
        dtype="bfloat16",
        kv_dtype="bfloat16",
        rope='{"base":10000.0}',
        prefix_digest="none",
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A real Valkey server without a password."""
    server = Server(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def make_record(context: KVContext) -> Callable[..., ChunkKV]:
    def make(
        ids: object,
        *,
        in_context: KVContext = context,
        layers: int = 2,
        heads: int = 2,
        dim: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        base_position: int = 5,
    ) -> ChunkKV:
        array = np.asarray(ids, dtype=np.int32)
        generator = torch.Generator().manual_seed(int(array.sum()) + 7 * array.size)
        shape = (layers, array.size, heads, dim)
        return ChunkKV(
            key=ChunkKey.of(in_context, array),
            token_ids=array,
            base_position=base_position,
            k=torch.randn(shape, generator=generator).to(dtype),
            v=torch.randn(shape, generator=generator).to(dtype),
        )

    return make


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_store(clock: Clock) -> Iterator[Callable[..., MemoryStore]]:
    """Stores whose integrity is checked when the test ends; nothing may be left leased."""
    made: list[MemoryStore] = []

    def make(byte_budget: int = 10**7, **settings: object) -> MemoryStore:
        store = MemoryStore(byte_budget, clock=clock, **settings)  # type: ignore[arg-type]
        made.append(store)
        return store

    yield make
    for store in made:
        store.check_integrity(expect_idle=True)


@pytest.fixture
def world(make_record: Make, context: KVContext) -> Iterator[World]:
    made = World(make_record, context)
    yield made
    made.far.gate.release(1000)
    assert made.fetcher.close(60)
    assert made.chain.close(60)
    made.store.check_integrity(expect_idle=True)
