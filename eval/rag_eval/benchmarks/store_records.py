"""Store benchmark, the records: KV saved from a paged pool, loaded into other slots, evicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from chunk_cache import ChunkKey, ChunkKV, MemoryStore, as_token_ids
from rag_eval.benchmarks.call_timer import CallTimer
from rag_eval.benchmarks.store_config import CONTEXT, SYSTEM_TOKENS, VOCABULARY, StoreBenchConfig


def time_records(config: StoreBenchConfig, progress: Callable[[str], None]) -> dict[str, Any]:
    """Time records between a token-slot pool ``[L, S, H, D]`` and the store, as an engine would."""
    rng = np.random.default_rng(config.seed)
    tokens = config.chunk_tokens
    slots = 4 * tokens
    shape = (config.layers, slots, config.kv_heads, config.head_dim)
    progress(f"saving and loading KV of {config.layers} layers, {config.records} records")
    generator = torch.Generator().manual_seed(config.seed)
    pool_k = torch.randn(shape, generator=generator).to(torch.bfloat16)
    pool_v = torch.randn(shape, generator=generator).to(torch.bfloat16)

    def record_of(ids: npt.NDArray[np.int32], at: torch.Tensor) -> ChunkKV:
        return ChunkKV(
            key=ChunkKey.of(CONTEXT, ids),
            token_ids=ids,
            base_position=SYSTEM_TOKENS,
            k=pool_k.index_select(1, at),
            v=pool_v.index_select(1, at),
        )

    def some_slots() -> torch.Tensor:
        return torch.from_numpy(rng.permutation(slots)[:tokens])

    def fresh_ids() -> npt.NDArray[np.int32]:
        return as_token_ids(rng.integers(0, VOCABULARY, tokens))

    def load(key: ChunkKey, ids: npt.NDArray[np.int32], target: torch.Tensor) -> None:
        lease = store.acquire(key, ids)
        if lease is None:
            raise AssertionError("a record that is listed is gone")
        with lease:
            for layer in range(config.layers):
                part = lease.record.layer(layer)
                pool_k[layer].index_copy_(0, target, part.k)
                pool_v[layer].index_copy_(0, target, part.v)

    sample = record_of(fresh_ids(), some_slots())
    store = MemoryStore(config.records * sample.num_bytes)
    saving, sealing, loading, evicting = CallTimer(), CallTimer(), CallTimer(), CallTimer()
    known: dict[ChunkKey, npt.NDArray[np.int32]] = {}
    for _ in range(config.repeats):
        ids, at = fresh_ids(), some_slots()
        full = store.free_bytes < sample.num_bytes
        record = saving(record_of, ids, at)
        commit = evicting if full else CallTimer()
        if not commit(store.put, record):
            raise AssertionError("the store refused a record that fits")
        saving.wall[-1] += commit.wall[-1]
        saving.cpu[-1] += commit.cpu[-1]
        known[record.key] = ids
        sealing(record.compute_checksum)

        ready = store.keys()
        wanted = ready[int(rng.integers(len(ready)))]
        target = some_slots()

        loading(load, wanted, known[wanted], target)
    store.check_integrity(expect_idle=True)
    report: dict[str, Any] = {
        "save": saving.report(),
        "load": loading.report(),
        "checksum": sealing.report(),
        "record_bytes": sample.num_bytes,
    }
    if evicting.wall:
        report["evict"] = evicting.report()
    return report
