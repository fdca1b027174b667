"""Groups of records in a Valkey server, such as the turns of one conversation: a list of names under the group's own.

A list is added to and never taken from, but for its oldest names: what it names may be evicted, expired or erased, and
is no member then. So nobody has to keep the two in step. It holds hashes only, no token ids: those stand in the records.
"""

from __future__ import annotations

import contextlib
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
        errors = self._server.errors
        name, value = group_name(group), record_of(key)
        with (
            contextlib.suppress(errors.OutOfMemoryError, errors.ExecAbortError),
            self._server.answers(),
        ):
            pipeline = self._server.client.pipeline(transaction=True)
            pipeline.lrem(name, 0, value)
            pipeline.rpush(name, value)
            pipeline.ltrim(name, -MOST_MEMBERS, -1)
            self._use(pipeline, name)
            pipeline.execute()

    def members(self, group: str, known: Container[ChunkKey]) -> list[Member]:
        """Records of a list that are there, in two round trips; see :meth:`~chunk_cache.Tier.members`."""
        name = group_name(group)
        pipeline = self._server.client.pipeline(transaction=False)
        pipeline.lrange(name, -MOST_MEMBERS, -1)
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
