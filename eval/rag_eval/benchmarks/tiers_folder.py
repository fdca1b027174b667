"""Part of ``bench tiers`` without an engine: loading a prompt's chunks from a folder, and indexing a large one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from chunk_cache import (
    Candidate,
    ChunkKey,
    ChunkKV,
    Fetcher,
    GuardedTier,
    MemoryStore,
    RecordForm,
    StoreFolder,
    TierChain,
    as_token_ids,
    chunk_path,
)
from rag_eval.benchmarks.call_timer import CallTimer
from rag_eval.benchmarks.store_config import CONTEXT
from rag_eval.errors import EvalError
from rag_kernels import RotarySpec
from rag_pipeline.sglang_plugin.fusion.forward.loader import Loader, LoadItem

_WAIT_S = 60.0


class FolderLoad:
    """Chunks of one prompt out of a folder into a pool, by the classes that an engine uses.

    One call fetches every record into an empty memory store, and writes it into the pool of each layer, its keys
    rotated by another distance per chunk; what an engine computes meanwhile is left out.

    Parameters
    ----------
    folder : Path
        Written by an engine.
    chunks : sequence of sequences of int
        Token ids of the chunks.
    rope_base : float
        Base of the rotation.

    Raises
    ------
    EvalError
        A chunk is not in the folder.
    """

    def __init__(self, folder: Path, chunks: Sequence[Sequence[int]], rope_base: float) -> None:
        self._tier = StoreFolder(folder)
        records = [self._record(tuple(ids)) for ids in chunks]
        self.num_tokens = sum(record.num_tokens for record in records)
        self.num_bytes = sum(record.num_bytes for record in records)
        first = records[0]
        inverse = rope_base ** -(torch.arange(0, first.k.shape[-1], 2).double() / first.k.shape[-1])
        self._spec = RotarySpec.from_inv_freq(inverse)
        shape = (self.num_tokens + 1, *first.k.shape[2:])
        self._pools = [
            (torch.zeros(shape, dtype=first.k.dtype), torch.zeros(shape, dtype=first.v.dtype))
            for _ in range(first.num_layers)
        ]
        self._wanted = [[Candidate(one.key, one.token_ids, CONTEXT, "")] for one in records]
        self._store = MemoryStore(2 * self.num_bytes)
        self._chain = TierChain({"disk": GuardedTier.of_folder(self._tier, name=str(folder))})
        self._fetcher = Fetcher(self._chain, self._store, RecordForm.of(first), patience_s=_WAIT_S)

    def _record(self, ids: tuple[int, ...]) -> ChunkKV:
        for key in self._tier.keys():  # noqa: SIM118 - not a mapping
            if key.num_tokens == len(ids):
                record = self._tier.read(key)
                if record is not None and record.tokens_equal(as_token_ids(ids)):
                    return record
        raise EvalError(f"the engine did not store a chunk of {len(ids)} tokens")

    def __call__(self) -> None:
        """Load everything once."""
        self._store.clear()
        fetches = self._fetcher.begin(self._wanted)
        self._fetcher.wait(lambda: all(one.has_header for one in fetches), _WAIT_S)
        items, leases, slot = [], [], 1
        for number, ((candidate,),) in enumerate(zip(self._wanted, strict=True)):
            lease = self._store.acquire(candidate.key, candidate.token_ids)
            if lease is None:
                raise EvalError(f"chunk {candidate.key} was not fetched")
            leases.append(lease)
            slots = torch.arange(slot, slot + candidate.key.num_tokens)
            items.append(
                LoadItem(record=lease.record, chunk_offset=0, slots=slots, delta=97 * (number + 1))
            )
            slot += candidate.key.num_tokens
        loader = Loader(items, self._spec)
        for layer, (k_pool, v_pool) in enumerate(self._pools):
            loader.ensure(layer, k_pool, v_pool)
        self._fetcher.drain(_WAIT_S)
        for lease in leases:
            lease.release()

    def close(self) -> None:
        """End the threads."""
        self._fetcher.close(_WAIT_S)
        self._chain.close(_WAIT_S)


def time_index(
    folder: Path, records: int, repeats: int, progress: Callable[[str], None]
) -> CallTimer:
    """Time :meth:`StoreFolder.connect` on a folder of so many records.

    Nothing of a file is read when a folder is opened, so they are holes of a small record's length: 100,000 of them
    are made, and removed again, without a block of data. All of them lie in one namespace; the first opening is not counted.
    """
    store = StoreFolder(folder, create=True)
    shape = (1, 1, 1, 2)
    first = ChunkKV(
        key=ChunkKey.of(CONTEXT, as_token_ids([1])),
        token_ids=as_token_ids([1]),
        base_position=0,
        k=torch.zeros(shape),
        v=torch.zeros(shape),
    )
    store.put(first, context=CONTEXT)
    num_bytes = chunk_path(folder, first.key).stat().st_size
    progress(f"making {records:,} records")
    for number in range(1, records):
        key = dataclasses.replace(
            first.key, digest=f"{number * 0x9E3779B97F4A7C15 % 2**64:064x}"[::-1]
        )
        path = chunk_path(folder, key)
        try:
            _make_hole(path, num_bytes)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_hole(path, num_bytes)
    timer = CallTimer()
    for turn in range(repeats + 1):
        opened = (timer if turn else CallTimer())(
            StoreFolder.connect, str(folder), byte_budget=1 << 40, model=""
        )
        found = sum(1 for _ in opened.keys())  # noqa: SIM118 - not a mapping
        if found != records:
            raise EvalError(f"the index holds {found} records of {records}")
        progress(f"indexed {found:,} records")
    return timer


def _make_hole(path: Path, num_bytes: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, num_bytes)
    finally:
        os.close(descriptor)
