"""Processes that write into one store's folder, for tests that kill them or let them race."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import torch

from chunk_cache import ChunkKey, ChunkKV, KVContext, StoreFolder

CONTEXT = KVContext(
    model_fingerprint="tiny-1",
    dtype="float32",
    kv_dtype="float32",
    rope='{"base":10000.0}',
    prefix_digest="none",
)
NUMBER = 24
"""Different records that are written."""


def record(number: int) -> ChunkKV:
    """A record whose content follows from its number."""
    ids = np.arange(number, number + 40 + number % 5, dtype=np.int32)
    shape = (4, ids.size, 2, 16)
    values = torch.arange(number, number + torch.Size(shape).numel(), dtype=torch.float32)
    return ChunkKV(
        key=ChunkKey.of(CONTEXT, ids),
        token_ids=ids,
        base_position=number,
        k=values.reshape(shape),
        v=-values.reshape(shape),
    )


def check(store: StoreFolder) -> int:
    """Read every record; returns how many are there, of which each is whole and right."""
    found = 0
    for number in range(NUMBER):
        meant = record(number)
        got = store.get(meant.key, meant.token_ids)
        if got is not None:
            found += 1
            assert torch.equal(got.k, meant.k)
            assert torch.equal(got.v, meant.v)
            assert got.base_position == number
    assert store.corrupt_files == 0
    return found


def forking() -> ForkServerContext:
    """Processes that are there at once, forked from one without threads that has all modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "chunk_cache.tiers.disk.folder"])
    return context


def write_on(folder: Path, budget: int, seed: int, ready: object = None, rounds: int = 0) -> None:
    """Change a store at random, so many times, or until killed."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    store = StoreFolder.connect(str(folder), byte_budget=budget, model="")
    if ready is not None:
        ready.set()  # type: ignore[attr-defined]
    step = 0
    while not rounds or step < rounds:
        step += 1
        one = record(chance.randrange(NUMBER))
        change = chance.choice(["put", "put", "put", "put", "used", "remove", "pin", "unpin"])
        with contextlib.suppress(FileNotFoundError):  # a pin whose folder another process removed
            if change == "put":
                store.put(one, context=CONTEXT)
            elif change == "used":
                store.used([one.key])
            elif change == "pin":
                store.pin(one.key)
                store.unpin(record(chance.randrange(NUMBER)).key)
            else:
                getattr(store, change)(one.key)
