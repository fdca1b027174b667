"""A Valkey tier of a test's own server, and a client beside it that sees what lies there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from valkey_server import Server

from chunk_cache import ChunkKV
from chunk_cache.tiers.guard import GuardedTier
from chunk_cache.tiers.remote.connect import connect_remote

Make = Callable[..., ChunkKV]
BUDGET = 1 << 30


def tier_of(server: Server, options: str = "?timeout=0.5", **settings: Any) -> GuardedTier:
    return connect_remote(server.url + options, byte_budget=BUDGET, model="m", **settings)


def client_of(server: Server) -> Any:
    import valkey

    return valkey.Valkey(port=server.port)


def name_of(record: ChunkKV) -> str:
    return f"ragkv:2:r:{record.key.namespace}:{record.key.digest}:{record.key.num_tokens}"


def same(found: ChunkKV | None, record: ChunkKV) -> bool:
    return (
        found is not None
        and found.k.equal(record.k)
        and found.v.equal(record.v)
        and found.base_position == record.base_position
        and found.tokens_equal(record.token_ids)
    )


def comes_back(tier: GuardedTier, record: ChunkKV) -> bool:
    until = time.monotonic() + 20
    while tier.open(record.key, record.token_ids) is None:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
