"""Chunk KV in a Valkey or Redis server, through the client ``valkey``.

::

    ragkv:2:r:<namespace>:<digest>:<tokens>    hash: h = header, 0, 1, ... = layers, c = context
    ragkv:2:n:<namespace>                      what the namespace stands for, JSON
    ragkv:2:t:<group>                          list of the records of a conversation, see ``valkey_groups``
    ragkv:2:w:<random>                         a record that is being written; the server drops what a crash left
    ragkv:2:e:...                              notices of erasure, see ``valkey_notices``

One hash per record, because a server evicts, expires and deletes by key: a record goes whole or stays whole. It is
written under another name and renamed, so a reader sees all of it or nothing. Records are named by their content and
never change: who finds one there already writes nothing, and no copy anywhere has to be invalidated. How many bytes
all records may take together is the server's ``maxmemory``, and what goes first its ``maxmemory-policy``.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, Self

from chunk_cache.keys import ChunkKey, KVContext
from chunk_cache.records import ChunkKV
from chunk_cache.tiers.base import Member
from chunk_cache.tiers.encoding import (
    EncodedRecord,
    RecordHeader,
    encode_record,
    read_header,
)
from chunk_cache.tiers.remote.described import describe_context, read_description
from chunk_cache.tiers.remote.header_first import FoundRecord, HeaderFirstTier
from chunk_cache.tiers.remote.notices import NoticeBoard
from chunk_cache.tiers.remote.url import RemoteURL, parse_remote_url
from chunk_cache.tiers.remote.valkey_client import PREFIX, TIMEOUT_S, ValkeyServer, need_client
from chunk_cache.tiers.remote.valkey_durability import Durability
from chunk_cache.tiers.remote.valkey_groups import Groups
from chunk_cache.tiers.remote.valkey_names import (
    RECORDS,
    key_named,
    namespace_name,
    record_of,
)
from chunk_cache.tiers.remote.valkey_notices import ValkeyNotices

_SCRATCH = f"{PREFIX}w:"
_WRITING_S = 300
"""What is being written is dropped by the server so long after its last layer."""
_WRITE_BYTES = 8 << 20
"""Bytes per round trip of a write."""
_FETCHES = 2
"""Calls for layers that run at once."""
_BATCH = 1000


class ValkeyTier(HeaderFirstTier):
    """Records in a server that several engines share: the remote tier ``valkey``.

    Parameters
    ----------
    url : RemoteURL
        Nothing is sent before the first call. Options: ``timeout`` (seconds), ``ttl`` (seconds that a record is kept
        after its last use; by default until the server evicts it), ``password_file``, ``ca_file``.
    byte_budget : int
        Most bytes of one record; more is declined. The sum is the server's own matter.
    model : str
        Folder of the model whose records are written, told beside them.
    codec : str
        Codec of what is written; what is read says its own.

    Raises
    ------
    ChunkCacheError
        If the client is not installed.
    """

    has_groups = True

    def __init__(
        self, url: RemoteURL, *, byte_budget: int, model: str = "", codec: str = "plain"
    ) -> None:
        self._server = ValkeyServer(url)
        super().__init__(wait_s=self._server.wait_s, calls=_FETCHES)
        self.url = url
        self.byte_budget = byte_budget
        self.model = model
        self.codec = codec
        self._ttl_ms = round(1000 * url.seconds("ttl", TIMEOUT_S)) if "ttl" in url.options else None
        self._client = self._server.client
        self._groups = Groups(self._server, ttl_ms=self._ttl_ms)
        self._durability = Durability(
            self._client,
            shown=url.shown,
            wait_s=self.wait_s,
            scratch=_SCRATCH,
            errors=self._server.errors,
        )
        self._removed = False
        """Whether anything was removed since the last :meth:`sync`."""

    @classmethod
    def check_usable(cls, location: str) -> None:
        """Refuse where the client is not installed."""
        need_client(parse_remote_url(location))

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> Self:
        """Prepare for a server, which need not be there yet."""
        return cls(parse_remote_url(location), byte_budget=byte_budget, model=model)

    def check(self) -> None:
        """Ask whether the server answers; raises as :meth:`ValkeyServer.check`."""
        self._server.check()

    @classmethod
    def connect_board(cls, location: str) -> NoticeBoard:
        """Where the servers of this store tell one another what was erased."""
        return ValkeyNotices(ValkeyServer(parse_remote_url(location)))

    # -- reading ------------------------------------------------------------------------------

    def contains(self, key: ChunkKey) -> bool:
        """Whether there is a record of this name."""
        with self._server.answers():
            return bool(self._client.exists(record_of(key)))

    def find(self, key: ChunkKey) -> FoundRecord | None:
        """Read the header in one round trip."""
        header = self._header(key)

        def fetch(first: int, last: int) -> Sequence[bytes | None]:
            with self._server.answers():
                found: list[bytes | None] = self._client.hmget(
                    record_of(key), list(range(first, last))
                )
            return found

        return None if header is None else FoundRecord(header, fetch)

    def _header(self, key: ChunkKey) -> RecordHeader | None:
        with self._server.answers():
            try:
                data = self._client.hget(record_of(key), "h")
            except self._server.errors.ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                data = b""
        if data is None:
            return None
        header = read_header(key, data)
        if header is None:
            self.discard(key)
        return header if header is not None and header.can_decode else None

    # -- writing ------------------------------------------------------------------------------

    def put(
        self, record: ChunkKV, *, context: KVContext | None = None, tenant: str | None = None
    ) -> bool:
        """Write a record, unless it is there; ``False`` where the server has no room.

        Raises
        ------
        OSError
            If the server does not answer, or refuses for another reason than room.
        """
        name = record_of(record.key)
        told = (
            None if context is None else describe_context(context, model=self.model, tenant=tenant)
        )
        if self._header(record.key) is None:
            encoded = encode_record(record, self.codec)
            if encoded.num_bytes > self.byte_budget:
                return False
            temporary = f"{_SCRATCH}{secrets.token_hex(12)}"
            with self._server.answers():
                try:
                    if not self._upload(temporary, encoded, told):
                        return False
                    # Not over one that somebody else finished first: its readers are in the midst of it.
                    if not self._client.renamenx(temporary, name) and not self._client.hexists(
                        name, "h"
                    ):
                        self._client.rename(temporary, name)  # what is there can be read by nobody
                except self._server.errors.OutOfMemoryError:
                    return False
                except self._server.errors.ResponseError as error:
                    if str(error) != "no such key":
                        raise
                    return False  # a server that is full evicted it before it had its name
                finally:
                    with contextlib.suppress(self._server.errors.ValkeyError):
                        self._client.unlink(temporary)
        with self._server.answers():
            if self._ttl_ms is None:
                self._client.persist(name)
            else:
                self._client.pexpire(name, self._ttl_ms)
        if told is not None:
            self._tell(record.key.namespace, told)
        return True

    def _upload(self, temporary: str, encoded: EncodedRecord, told: bytes | None) -> bool:
        """Write all fields under a temporary name; whether all of them are there at the end."""
        fields: dict[str, bytes] = {} if told is None else {"c": told}
        number = len(fields)
        # The header last: a hash that was cut short has none, and is no record.
        for field, data in [*enumerate(encoded.layers), ("h", encoded.header)]:
            fields[str(field)] = data
            number += 1
            if field == "h" or sum(map(len, fields.values())) >= _WRITE_BYTES:
                pipeline = self._client.pipeline(transaction=False)
                pipeline.hset(temporary, mapping=fields)
                pipeline.expire(temporary, _WRITING_S)
                pipeline.hlen(temporary)
                there = pipeline.execute()[-1]
                fields = {}
        # A server that is full may have evicted the first of them meanwhile.
        return bool(there == number)

    def remove(self, key: ChunkKey) -> bool:
        """Delete a record whatever holds it; ``False`` if it was not there."""
        self._removed = True
        with self._server.answers():
            return bool(self._client.unlink(record_of(key)))

    def sync(self) -> None:
        """Have a server that keeps its data on a disk write the removals there.

        Raises
        ------
        ChunkCacheError
            If it does not: after a restart from what it saved before, removed records would be there again.
        OSError
            If it does not answer.
        """
        if not self._removed:
            return
        with self._server.answers():
            self._durability.settle()
        self._removed = False

    # -- listing ------------------------------------------------------------------------------

    def keys(self) -> Iterator[ChunkKey]:
        """Keys of all records of this format that the server has."""
        return iter(self._keys("*"))

    def _keys(self, namespace: str, most: int | None = None) -> list[ChunkKey]:
        found: dict[ChunkKey, None] = {}
        with self._server.answers():
            for name in self._client.scan_iter(f"{RECORDS}{namespace}:*", count=_BATCH):
                if (key := key_named(name)) is not None:
                    found[key] = None
                if most is not None and len(found) >= most:
                    break
        return list(found)

    def keys_by_use(self) -> list[ChunkKey]:
        """All keys, the longest unused first where the server keeps times of use (not with an LFU policy)."""
        keys = self._keys("*")
        idle: list[int] = []
        try:
            for first in range(0, len(keys), _BATCH):
                with self._server.answers():
                    pipeline = self._client.pipeline(transaction=False)
                    for key in keys[first : first + _BATCH]:
                        pipeline.object("IDLETIME", record_of(key))
                    idle += [int(seconds or 0) for seconds in pipeline.execute()]
        except OSError:
            return keys
        return [key for _, key in sorted(zip(idle, keys, strict=True), key=lambda pair: -pair[0])]

    def used(self, keys: Iterable[ChunkKey]) -> None:
        """Note use: the server evicts these last, and a ``ttl`` begins anew."""
        names = [record_of(key) for key in keys]
        with contextlib.suppress(OSError), self._server.answers():
            for first in range(0, len(names), _BATCH):
                pipeline = self._client.pipeline(transaction=False)
                pipeline.touch(*names[first : first + _BATCH])
                for name in names[first : first + _BATCH] if self._ttl_ms is not None else ():
                    pipeline.pexpire(name, self._ttl_ms)
                pipeline.execute()

    def note_context(self, context: KVContext) -> None:
        """Keep what a namespace stands for."""
        self._tell(context.namespace, describe_context(context, model=self.model))

    def _tell(self, namespace: str, told: bytes) -> None:
        # With each record: a server that evicts may have dropped it.
        with contextlib.suppress(self._server.errors.OutOfMemoryError), self._server.answers():
            self._client.set(namespace_name(namespace), told)

    def describe(self, namespace: str) -> dict[str, Any] | None:
        """Fields of a namespace's context: its own entry's, else those that came with one of its records."""
        with self._server.answers():
            found = read_description(self._client.get(namespace_name(namespace)))
            if found is None:
                for key in self._keys(namespace, most=1):
                    found = read_description(self._client.hget(record_of(key), "c"))
        return found

    def note_member(self, group: str, key: ChunkKey) -> None:
        """Add to the list of a group."""
        self._groups.add(group, key)

    def members(self, group: str, known: Container[ChunkKey] = ()) -> list[Member]:
        """Read the list of a group, and the headers of what is on it."""
        return self._groups.members(group, known)
