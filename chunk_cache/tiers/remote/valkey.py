"""Chunk KV in a Valkey or Redis server, through the client ``valkey``.

::

    ragkv:2:r:<namespace>:<digest>:<tokens>    hash: h = header, 0, 1, ... = layers, c = context
    ragkv:2:n:<namespace>                      what the namespace stands for, JSON
    ragkv:2:w:<random>                         a record that is being written; the server drops what a crash left

One hash per record, because a server evicts, expires and deletes by key: a record goes whole or stays whole. It is
written under another name and renamed, so a reader sees all of it or nothing. Records are named by their content and
never change: who finds one there already writes nothing, and no copy anywhere has to be invalidated. How many bytes
all records may take together is the server's ``maxmemory``, and what goes first its ``maxmemory-policy``.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

from chunk_cache.errors import ChunkCacheError
from chunk_cache.keys import ChunkKey, KVContext, TokenIds
from chunk_cache.records import ChunkKV
from chunk_cache.tiers.base import LayerReader, Tier
from chunk_cache.tiers.encoding import (
    DamagedRecordError,
    EncodedRecord,
    RecordHeader,
    encode_record,
    read_header,
)
from chunk_cache.tiers.prefetch import PrefetchedRecord
from chunk_cache.tiers.remote.described import describe_context, read_description
from chunk_cache.tiers.remote.url import RemoteURL, parse_remote_url

_PREFIX = "ragkv:2:"
_TIMEOUT_S = 1.0
"""Longest that one read of the socket waits, by default; also what a request waits for all layers of a record."""
_WRITING_S = 300
"""What is being written is dropped by the server so long after its last layer."""
_WRITE_BYTES = 8 << 20
"""Bytes per round trip of a write."""
_READ_BYTES = 1 << 20
"""Bytes per read of the socket."""
_FETCHES = 2
"""Calls for layers that run at once."""
_SAVE_S = 60.0
"""Longest that :meth:`ValkeyTier.sync` waits for the server's disk."""
_LOG_S = 5.0
"""The same where it only has to sync its log, which it does every second."""
_BATCH = 1000


class ValkeyTier(Tier):
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

    Attributes
    ----------
    damaged_records : int
        Records that were not what was written; they are deleted, so that they can be written anew.
    """

    def __init__(
        self, url: RemoteURL, *, byte_budget: int, model: str = "", codec: str = "plain"
    ) -> None:
        self.url = url
        self.byte_budget = byte_budget
        self.model = model
        self.codec = codec
        self.damaged_records = 0
        self.wait_s = url.seconds("timeout", _TIMEOUT_S)
        self._ttl_ms = (
            round(1000 * url.seconds("ttl", _TIMEOUT_S)) if "ttl" in url.options else None
        )
        self._gate = threading.Semaphore(_FETCHES)
        self._client, self._errors = _client(url, self.wait_s)
        self._removed = False
        """Whether anything was removed since the last :meth:`sync`."""

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> Self:
        """Prepare for a server, which need not be there yet."""
        return cls(parse_remote_url(location), byte_budget=byte_budget, model=model)

    def check(self) -> None:
        """Ask whether the server answers and lets us in.

        Raises
        ------
        OSError
            If not.
        """
        with self._answers():
            self._client.ping()

    # -- reading ------------------------------------------------------------------------------

    def contains(self, key: ChunkKey) -> bool:
        """Whether there is a record of this name."""
        with self._answers():
            return bool(self._client.exists(_record(key)))

    def open(self, key: ChunkKey, token_ids: TokenIds) -> LayerReader | None:
        """Read the header in one round trip, and let the layers follow in a thread."""
        header = self._header(key)
        if header is None or not (header.token_ids == token_ids).all():
            return None
        return self._reader(header, self.wait_s)

    def read(self, key: ChunkKey) -> ChunkKV | None:
        """Read a whole record whatever its tokens are; ``None`` where it is damaged or gone."""
        header = self._header(key)
        if header is None:
            return None
        try:
            return self._reader(header, 10 * self.wait_s).record()
        except ChunkCacheError:  # counted where it was found
            return None

    def token_ids(self, key: ChunkKey) -> TokenIds | None:
        """Token ids of a record, from its header."""
        header = self._header(key)
        return None if header is None else header.token_ids

    def size_of(self, key: ChunkKey) -> int:
        """Bytes of a record, from its header."""
        header = self._header(key)
        return 0 if header is None else header.num_bytes

    def _header(self, key: ChunkKey) -> RecordHeader | None:
        with self._answers():
            try:
                data = self._client.hget(_record(key), "h")
            except self._errors.ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                data = b""
        if data is None:
            return None
        header = read_header(key, data)
        if header is None:
            self._discard(key)
        return header if header is not None and header.can_decode else None

    def _reader(self, header: RecordHeader, wait_s: float) -> PrefetchedRecord:
        def fetch(first: int, last: int) -> Sequence[bytes | None]:
            with self._answers():
                found: list[bytes | None] = self._client.hmget(
                    _record(header.key), list(range(first, last))
                )
            return found

        return PrefetchedRecord(
            header,
            fetch,
            wait_s=wait_s,
            gate=self._gate,
            damaged=lambda: self._discard(header.key),
        )

    def _discard(self, key: ChunkKey) -> None:
        """Drop what is damaged: as long as it is there, nobody would write the record anew."""
        self.damaged_records += 1
        with contextlib.suppress(OSError), self._answers():
            self._client.unlink(_record(key))

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
        name = _record(record.key)
        told = (
            None if context is None else describe_context(context, model=self.model, tenant=tenant)
        )
        if self._header(record.key) is None:
            encoded = encode_record(record, self.codec)
            if encoded.num_bytes > self.byte_budget:
                return False
            temporary = f"{_PREFIX}w:{secrets.token_hex(12)}"
            with self._answers():
                try:
                    if not self._upload(temporary, encoded, told):
                        return False
                    # Not over one that somebody else finished first: its readers are in the midst of it.
                    self._client.renamenx(temporary, name)
                except self._errors.OutOfMemoryError:
                    return False
                finally:
                    with contextlib.suppress(self._errors.ValkeyError):
                        self._client.unlink(temporary)
        with self._answers():
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
        with self._answers():
            return bool(self._client.unlink(_record(key)))

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
        with self._answers():
            state = self._client.info("persistence")
            if state.get("aof_enabled"):
                self._wait_for_log()
            elif self._client.config_get("save").get("save"):
                self._save(state)
        self._removed = False

    def _wait_for_log(self) -> None:
        """Have the log synced up to now."""
        until = time.monotonic() + _LOG_S
        # The server waits for what came before on the same connection, hence one connection and a write.
        with self._client.client() as connection:
            connection.set(f"{_PREFIX}w:{secrets.token_hex(12)}", b"", ex=1)
            # In steps that are shorter than a read of the socket may last.
            while not connection.execute_command("WAITAOF", 1, 0, max(1, int(500 * self.wait_s)))[
                0
            ]:
                if time.monotonic() > until:
                    raise ChunkCacheError(
                        f"{self.url.shown} has not written its log to disk in {_LOG_S:g} s; "
                        "give it appendfsync everysec or always"
                    )

    def _save(self, state: dict[str, Any]) -> None:
        """Have a snapshot made that begins now."""
        until = time.monotonic() + _SAVE_S
        while state["rdb_bgsave_in_progress"]:
            # It holds what was there when it began.
            state = self._after_a_moment(until)
        before = state["rdb_saves"]
        self._client.bgsave()
        while state["rdb_saves"] == before:
            state = self._after_a_moment(until)
            if not state["rdb_bgsave_in_progress"] and state["rdb_last_bgsave_status"] != "ok":
                raise OSError(f"{self.url.shown} could not save its data")

    def _after_a_moment(self, until: float) -> dict[str, Any]:
        if time.monotonic() > until:
            raise ChunkCacheError(f"{self.url.shown} has not saved its data in {_SAVE_S:g} s")
        time.sleep(0.02)
        state: dict[str, Any] = self._client.info("persistence")
        return state

    # -- listing ------------------------------------------------------------------------------

    def keys(self) -> Iterator[ChunkKey]:
        """Keys of all records of this format that the server has."""
        return iter(self._keys("*"))

    def _keys(self, namespace: str, most: int | None = None) -> list[ChunkKey]:
        found: dict[ChunkKey, None] = {}
        with self._answers():
            for name in self._client.scan_iter(f"{_PREFIX}r:{namespace}:*", count=_BATCH):
                parts = name.decode("ascii", "replace").removeprefix(f"{_PREFIX}r:").split(":")
                # What is not named as we name records is none.
                with contextlib.suppress(ValueError):
                    space, digest, tokens = parts
                    if len(space) == 32 and len(digest) == 64:
                        found[ChunkKey(space, digest, int(tokens))] = None
                if most is not None and len(found) >= most:
                    break
        return list(found)

    def keys_by_use(self) -> list[ChunkKey]:
        """All keys, the longest unused first where the server keeps times of use (not with an LFU policy)."""
        keys = self._keys("*")
        idle: list[int] = []
        try:
            for first in range(0, len(keys), _BATCH):
                with self._answers():
                    pipeline = self._client.pipeline(transaction=False)
                    for key in keys[first : first + _BATCH]:
                        pipeline.object("IDLETIME", _record(key))
                    idle += [int(seconds or 0) for seconds in pipeline.execute()]
        except OSError:
            return keys
        return [key for _, key in sorted(zip(idle, keys, strict=True), key=lambda pair: -pair[0])]

    def used(self, keys: Iterable[ChunkKey]) -> None:
        """Note use: the server evicts these last, and a ``ttl`` begins anew."""
        names = [_record(key) for key in keys]
        with contextlib.suppress(OSError), self._answers():
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
        with contextlib.suppress(self._errors.OutOfMemoryError), self._answers():
            self._client.set(f"{_PREFIX}n:{namespace}", told)

    def describe(self, namespace: str) -> dict[str, Any] | None:
        """Fields of a namespace's context: its own entry's, else those that came with one of its records."""
        with self._answers():
            found = read_description(self._client.get(f"{_PREFIX}n:{namespace}"))
            if found is None:
                for key in self._keys(namespace, most=1):
                    found = read_description(self._client.hget(_record(key), "c"))
        return found

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        """Turn whatever the client raises into :class:`OSError`, without what is secret."""
        try:
            yield
        except (self._errors.OutOfMemoryError, DamagedRecordError):
            raise
        except self._errors.TimeoutError as error:
            raise TimeoutError(f"{self.url.shown}: {error}") from None
        except self._errors.ValkeyError as error:
            raise OSError(f"{self.url.shown}: {error}") from None


def _record(key: ChunkKey) -> str:
    return f"{_PREFIX}r:{key.namespace}:{key.digest}:{key.num_tokens}"


def _client(url: RemoteURL, wait_s: float) -> tuple[Any, Any]:
    """A client that has sent nothing yet, and the module of its exceptions."""
    try:
        import valkey
        from valkey.backoff import NoBackoff
        from valkey.retry import Retry
    except ImportError:
        raise ChunkCacheError(
            f'{url.shown} needs the package valkey: pip install "rag-pipeline[valkey]"'
        ) from None
    # Once more at once: a server that was restarted closed the connections of before. Not after a time-out.
    gone = (valkey.exceptions.ConnectionError,)
    secure: dict[str, Any] = {}
    if url.kind in ("valkeys", "rediss"):
        secure["connection_class"] = valkey.SSLConnection
        if "ca_file" in url.options:
            secure["ssl_ca_certs"] = url.options["ca_file"]
    pool = valkey.ConnectionPool(
        host=url.host,
        port=url.port,
        db=url.database,
        username=url.user,
        password=url.password,
        socket_timeout=wait_s,
        socket_connect_timeout=wait_s,
        socket_keepalive=True,
        # Layers are long: the default of 64 KiB spends more time in Python than in the network.
        socket_read_size=_READ_BYTES,
        retry=Retry(NoBackoff(), 1, gone),
        retry_on_error=list(gone),
        **secure,
    )
    client = valkey.Valkey(connection_pool=pool)
    return client, valkey.exceptions
