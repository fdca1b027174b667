"""Any storage backend that SGLang ships as a tier: ``hicache+file:///folder``, ``hicache+mooncake://host:port``.

The layers of a record are one run of bytes, cut into pages of one size, because that is what these backends keep. The
header lies in a :class:`~.catalog.Catalog`, which decides whether the record exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from chunk_cache import (
    ChunkKey,
    ChunkKV,
    FetchLayers,
    FoundRecord,
    HeaderFirstTier,
    KVContext,
    Member,
    NoticeBoard,
    RemoteURL,
    describe_context,
    encode_record,
    parse_remote_url,
)
from rag_pipeline.config import home_dir
from rag_pipeline.sglang_plugin.hicache.backend import PageStore, check_backend
from rag_pipeline.sglang_plugin.hicache.catalog import Catalog, Entry
from rag_pipeline.sglang_plugin.hicache.notices import FolderNotices

_PAGE_KIB = 256
_OWN = ("timeout", "catalog", "page_kib")
"""Options that are not the backend's."""


class HiCacheTier(HeaderFirstTier):
    """Records in a storage backend of SGLang's hierarchical cache: the remote tier ``hicache``.

    Parameters
    ----------
    url : RemoteURL
        Options: ``timeout`` (seconds that a request waits for all layers of a record), ``page_kib``, ``catalog`` (the
        folder of headers; servers on several machines name one that all of them mount), and the backend's own.
    byte_budget : int
        Most bytes of one record; the sum is the backend's own matter.
    model : str
        Folder of the model whose records are written, told beside them.

    Raises
    ------
    ChunkCacheError, OSError
        SGLang has no such backend, or the catalog cannot be made. That a server is down shows only in calls.
    """

    has_groups = True

    def __init__(self, url: RemoteURL, *, byte_budget: int, model: str = "") -> None:
        super().__init__(wait_s=url.seconds("timeout", 1.0), calls=2)
        self.url = url
        self.byte_budget = byte_budget
        self.model = model
        self.codec = "plain"
        self._page_bytes = round(1024 * url.seconds("page_kib", _PAGE_KIB))
        self._store = PageStore(
            url,
            page_bytes=self._page_bytes,
            options={k: v for k, v in url.options.items() if k not in _OWN},
        )
        self.catalog = Catalog(_catalog_folder(url))

    @classmethod
    def check_usable(cls, location: str) -> None:
        """Refuse a backend that SGLang has not, or whose package is not installed."""
        check_backend(parse_remote_url(location))

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> Self:
        """Prepare for a backend, whose servers need not be there yet."""
        return cls(parse_remote_url(location), byte_budget=byte_budget, model=model)

    @classmethod
    def connect_board(cls, location: str) -> NoticeBoard:
        """Where the servers of this store tell one another what was erased: beside the catalog that they share."""
        url = parse_remote_url(location)
        is_shared = "catalog" in url.options or url.backend == "file"
        limits = (
            "notices of erasure reach the servers of this machine only, as its catalog does; for several machines name a "
            "folder that all of them mount: ?catalog=FOLDER"
        )
        folder = _catalog_folder(url) / "erased"
        return FolderNotices(folder, limits="" if is_shared else limits)

    def check(self) -> None:
        """Begin to connect, in a thread: a backend may take many seconds for it.

        Until it has, calls wait for it as long as they may.
        """
        threading.Thread(target=self._first_call, name="chunk-kv-hicache", daemon=True).start()

    def _first_call(self) -> None:
        with contextlib.suppress(OSError):  # the next call says why
            self._store.get(["absent"])

    # -- reading ------------------------------------------------------------------------------

    def contains(self, key: ChunkKey) -> bool:
        """Whether the catalog has it; its pages may still be gone."""
        return self.catalog.has(key)

    def find(self, key: ChunkKey) -> FoundRecord | None:
        """Read the header from the catalog."""
        entry = self._find(key)
        return None if entry is None else FoundRecord(entry.header, self._fetch_of(entry))

    def _find(self, key: ChunkKey) -> Entry | None:
        entry = self.catalog.find(key)
        if entry is None:
            self.damaged_records += self.catalog.has(key)
        elif not entry.label.startswith(f"{self._page_bytes}-"):
            return None  # of a server that was given another page_kib
        return entry

    def _fetch_of(self, entry: Entry) -> FetchLayers:
        header = entry.header
        body, size = header.header_bytes, self._page_bytes
        names = self._names(entry.label, header.num_bytes - body)
        had: dict[int, bytes] = {}

        def fetch(first: int, last: int) -> Sequence[memoryview | None]:
            begin, end = header.layer_range(first)[0] - body, header.layer_range(last - 1)[1] - body
            numbers = range(begin // size, -(-end // size))
            missing = [number for number in numbers if number not in had]
            for number, page in zip(
                missing, self._store.get([names[n] for n in missing]), strict=True
            ):
                if page is None:
                    return [None] * (last - first)
                had[number] = page
            run = memoryview(bytearray(b"".join(had[number] for number in numbers)))
            skipped = numbers[0] * size + body
            # The last page holds the beginning of the next layer.
            for number in numbers[:-1]:
                del had[number]
            return [
                run[slice(*(at - skipped for at in header.layer_range(index)))]
                for index in range(first, last)
            ]

        return fetch

    # -- writing ------------------------------------------------------------------------------

    def put(
        self, record: ChunkKV, *, context: KVContext | None = None, tenant: str | None = None
    ) -> bool:
        """Write a record, unless it is there; ``False`` where the backend declines it."""
        if context is not None:
            told = describe_context(context, model=self.model, tenant=tenant)
            self.catalog.tell(record.key.namespace, told)
        if self._find(record.key) is not None:
            return True
        encoded = encode_record(record, self.codec)
        if encoded.num_bytes > self.byte_budget:
            return False
        run = memoryview(b"".join(encoded.parts[1:]))
        # Backends keep what they have under a name, so each write has names of its own.
        label = f"{self._page_bytes}-{secrets.token_hex(16)}"
        names = self._names(label, len(run))
        size = self._page_bytes
        if not self._store.put(names, [run[i * size : (i + 1) * size] for i in range(len(names))]):
            return False
        self.catalog.add(record.key, encoded.header, label)
        return True

    def remove(self, key: ChunkKey) -> bool:
        """Make a record not exist, and delete its pages where the backend can; ``False`` if it did not exist.

        Pages that stay have a name that nobody knows any more; the backend drops them when it needs the room.
        """
        entry = self.catalog.find(key)
        gone = self.catalog.remove(key)
        if entry is not None:
            with contextlib.suppress(OSError):
                header = entry.header
                self._store.delete(self._names(entry.label, header.num_bytes - header.header_bytes))
        return gone

    def sync(self) -> None:
        """Make removals survive a power cut, in the catalog."""
        self.catalog.sync()

    def _names(self, label: str, num_bytes: int) -> list[str]:
        return [f"{label}-{i}" for i in range(-(-num_bytes // self._page_bytes))]

    # -- listing ------------------------------------------------------------------------------

    def keys(self) -> Iterator[ChunkKey]:
        """Keys in the catalog."""
        return iter(self.catalog.keys())

    def keys_by_use(self) -> list[ChunkKey]:
        """Keys in the catalog, the longest unused first."""
        return self.catalog.keys(by_use=True)

    def used(self, keys: Iterable[ChunkKey]) -> None:
        """Note use in the catalog."""
        self.catalog.used(keys)

    def note_context(self, context: KVContext) -> None:
        """Keep what a namespace stands for."""
        self.catalog.tell(context.namespace, describe_context(context, model=self.model))

    def describe(self, namespace: str) -> dict[str, Any] | None:
        """Fields of a namespace's context."""
        return self.catalog.describe(namespace)

    def note_member(self, group: str, key: ChunkKey) -> None:
        """Note it in the catalog."""
        self.catalog.note_member(group, key)

    def members(self, group: str, known: Container[ChunkKey] = ()) -> list[Member]:
        """Records of a group that the catalog has; their pages may still be gone."""
        found: list[Member] = []
        for key in self.catalog.members(group):
            entry = None if key in known else self._find(key)
            told = None if entry is None else self.catalog.describe(key.namespace)
            if entry is not None and told is not None:
                found.append(Member(key, told, entry.header.token_ids))
        return found


def _catalog_folder(url: RemoteURL) -> Path:
    """The folder that was named; beside the pages of a ``file`` backend; else one of this user, by the address."""
    if "catalog" in url.options:
        return Path(url.options["catalog"]).absolute()
    if url.backend == "file":
        return Path(url.path) / "catalog"
    name = hashlib.blake2b(url.shown.encode(), digest_size=8).hexdigest()
    return home_dir() / "remote-catalogs" / f"{url.backend}-{name}"
