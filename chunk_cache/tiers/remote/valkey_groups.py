"""Groups of records in a Valkey server, such as the turns of one conversation: a list of names under the group's own.

A list (a sorted set, by the time at which a name was added) is added to and never taken from, but for its oldest names:
what it names may be evicted, expired or erased, and is no member then. So nobody has to keep the two in step. It holds
hashes only, no token ids: those stand in the records. A clock that is wrong changes which names are taken for the oldest.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container
from typing import Any

from chunk_cache.keys import ChunkKey
from chunk_cache.tiers.base import Member
from chunk_cache.tiers.encoding import read_header
from chunk_cache.tiers.remote.described import read_description
from chunk_cache.tiers.remote.valkey_client import ValkeyServer
from chunk_cache.tiers.remote.valkey_names import group_name, key_named, namespace_name, record_of

MOST_MEMBERS = 256
"""Of one group, the newest."""


class Groups:
    """The lists in one server.

    Parameters
    ----------
    server : ValkeyServer
        Where they lie; its own words are raised as of :meth:`ValkeyServer.answers`.
    ttl_ms : int or None
        How long a list is kept after its last use, as a record is; None until the server evicts it.
    """

    def __init__(self, server: ValkeyServer, *, ttl_ms: int | None) -> None:
        self._server = server
        self._ttl_ms = ttl_ms

    def add(self, group: str, key: ChunkKey) -> None:
        """Put a record at the end of a list; without effect in a server that has no room."""
        name = group_name(group)
        with contextlib.suppress(self._server.errors.OutOfMemoryError), self._server.answers():
            # No transaction: who may only read and write needs no further rights.
            pipeline = self._server.client.pipeline(transaction=False)
            pipeline.zadd(name, {record_of(key): time.time()})
            pipeline.zremrangebyrank(name, 0, -MOST_MEMBERS - 1)
            self._use(pipeline, name)
            pipeline.execute()

    def members(self, group: str, known: Container[ChunkKey]) -> list[Member]:
        """Records of a list that are there, in two round trips; see :meth:`~chunk_cache.Tier.members`."""
        name = group_name(group)
        pipeline = self._server.client.pipeline(transaction=False)
        pipeline.zrange(name, -MOST_MEMBERS, -1)
        self._use(pipeline, name)
        # A name that holds something else is no list of ours.
        (names, *_) = self._run(pipeline)
        found = [key_named(one) for one in names] if isinstance(names, list) else []
        keys = [key for key in found if key is not None and key not in known]
        if not keys:
            return []
        pipeline = self._server.client.pipeline(transaction=False)
        for key in keys:
            pipeline.hmget(record_of(key), "h", "c")
            pipeline.get(namespace_name(key.namespace))
        rows = self._run(pipeline)
        told = zip(keys, rows[::2], rows[1::2], strict=True)
        return [one for row in told if (one := _member(*row)) is not None]

    def _use(self, pipeline: Any, name: str) -> None:
        if self._ttl_ms is not None:
            pipeline.pexpire(name, self._ttl_ms)

    def _run(self, pipeline: Any) -> list[Any]:
        with self._server.answers():
            rows: list[Any] = pipeline.execute(raise_on_error=False)
        return rows


def _member(key: ChunkKey, fields: Any, context: Any) -> Member | None:
    """Put together what three answers tell; an answer may be an error instead."""
    header, beside = fields if isinstance(fields, list) else (None, None)
    described = read_description(context if isinstance(context, bytes) else None)
    described = described if described is not None else read_description(beside)
    parsed = read_header(key, header) if header is not None else None
    if parsed is None or described is None or not parsed.can_decode:
        return None
    return Member(key, described, parsed.token_ids)
