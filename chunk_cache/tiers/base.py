"""The contract of tiers below memory, and the tiers by name."""

from __future__ import annotations

import abc
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

from chunk_cache.errors import ChunkCacheError
from chunk_cache.keys import ChunkKey, KVContext, TokenIds
from chunk_cache.layouts.base import LayerKV
from chunk_cache.records import ChunkKV
from rag_kernels import Registry


class LayerReader(Protocol):
    """A record that is read layer by layer; a :class:`ChunkKV`, which is in memory, is one.

    Layers are read in order, each once, by one thread at a time (:class:`~chunk_cache.Fetcher`), which copies them
    into memory; a forward waits for the layer that it needs. Whatever :meth:`layer` raises, and damage raises, ends the
    reading (:class:`~chunk_cache.DamagedRecordError` where the bytes are wrong): the record is a miss, and a request that used it already is prefilled as usual. So a reader that fails costs
    time and nothing else; one that hangs occupies the thread, and should therefore time out.
    """

    @property
    def token_ids(self) -> TokenIds:
        """Token ids of the record, int32 ``[T]``; compared when it was opened."""
        ...

    @property
    def base_position(self) -> int:
        """Position at which the first token's KV was computed."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        ...

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        ...

    @property
    def layout(self) -> str:
        """Name of the record's :class:`KVLayout`."""
        ...

    @property
    def codec(self) -> str:
        """Name of the :class:`~chunk_cache.Codec` that its KV went through."""
        ...

    @property
    def is_lossless(self) -> bool:
        """Whether every bit is as the model computed it; what is not is never taken for exact KV."""
        ...

    # A reader of a record with side tensors (:attr:`ChunkKV.side`) has them as ``side``; most records have none.

    def layer(self, index: int, start: int = 0, end: int | None = None) -> LayerKV:
        """Tokens ``[start, end)`` of one layer, on any device; blocks until they are there."""
        ...


class DirectReader(LayerReader, Protocol):
    """A reader that can spare a copy; :class:`~chunk_cache.Fetcher` looks for the method."""

    def layers_into(self, first: int, places: Sequence[LayerKV]) -> bool:
        """Write whole layers, one behind the other, into memory of the record's shapes that nobody reads yet.

        Returns
        -------
        bool
            ``False`` where they are stored otherwise, and nothing was written: :meth:`layer` reads them then. What it
            raises it raises too; what stands in `places` is worthless then.
        """
        ...


class Member(NamedTuple):
    """A record of a group, see :meth:`Tier.members`."""

    key: ChunkKey
    context: Mapping[str, Any]
    """Of its namespace, as :meth:`Tier.describe` tells it."""
    token_ids: TokenIds


class Tier(abc.ABC):
    """A place below the memory tier that holds records by key.

    **Safety.** A tier never gives wrong bytes: what is damaged, of other token ids, or unreadable is a miss, not an
    exception. :meth:`put` makes a record visible whole or not at all. Every method may be called from several threads
    and beside other processes that use the same place; no lock is held between two calls, so what :meth:`contains`
    saw may be gone in :meth:`open`.

    **Who waits.** Reading happens while an engine starts and in threads of its own (:class:`~chunk_cache.Fetcher`) when
    a request's chunk is not in memory, writing in another (:class:`~chunk_cache.BackgroundWriter`): all may take long; a
    forward waits for a bounded time, then does without. Writing, removing and :meth:`connect` raise
    :class:`OSError` or :class:`~chunk_cache.ChunkCacheError` where the place refuses; callers count it and go on.

    **Erasing.** After :meth:`remove` and :meth:`sync` a record never comes back, not even after a power cut.

    An implementation needs the abstract methods, and :meth:`describe` if engines shall read from it at their start.
    """

    is_shared: bool = False
    """Whether several servers share the place: then it is not one engine's to list, and may hold millions."""
    has_groups: bool = False
    """Whether :meth:`note_member` and :meth:`members` do anything."""
    codec: str = "plain"
    """Name of the :class:`~chunk_cache.Codec` that :meth:`put` writes with, where a tier encodes; who connects sets it."""

    @classmethod
    def check_usable(cls, location: str) -> None:
        """Check what can be known of a place before an engine starts; nothing is changed, and no server is asked.

        Parameters
        ----------
        location : str
            As of :meth:`connect`.

        Raises
        ------
        ChunkCacheError
            One line: it can never be used, such as a file in place of a folder, or a package that is not installed.
        """
        return  # most places can tell nothing beforehand

    @classmethod
    @abc.abstractmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> Self:
        """Open a place for an engine, making it if it is not there, and clear up what crashes left.

        Parameters
        ----------
        location : str
            The operator's ``fusion.store_dir``: a folder, an address.
        byte_budget : int
            Most bytes of all records that lie there.
        model : str
            Folder of the model whose records are written.

        Raises
        ------
        ChunkCacheError, OSError
            If it cannot be used; the engine then works without.
        """

    @abc.abstractmethod
    def contains(self, key: ChunkKey) -> bool:
        """Whether a record is there; nothing of it is read, so it may still turn out damaged."""

    @abc.abstractmethod
    def read(self, key: ChunkKey) -> ChunkKV | None:
        """Read a whole record whatever its tokens are; ``None`` where it is damaged or gone."""

    @abc.abstractmethod
    def put(
        self, record: ChunkKV, *, context: KVContext | None = None, tenant: str | None = None
    ) -> bool:
        """Write a record (any device), replacing an older one of its key.

        Parameters
        ----------
        record : ChunkKV
            What to write; only read.
        context : KVContext, optional
            Of the record's namespace, to be kept for :meth:`describe`.
        tenant : str, optional
            :func:`~.tenant_mark` of whom the record belongs to; by default that of the context's salt.

        Returns
        -------
        bool
            ``False`` where the tier declined it (full, too big).
        """

    @abc.abstractmethod
    def remove(self, key: ChunkKey) -> bool:
        """Drop a record whatever holds it; ``False`` if it was not there."""

    @abc.abstractmethod
    def keys(self) -> Iterator[ChunkKey]:
        """Iterate over the keys held when the call was made."""

    # -- with defaults ------------------------------------------------------------------------

    def get(self, key: ChunkKey, token_ids: TokenIds) -> ChunkKV | None:
        """Read a whole record, or ``None`` when it is absent, damaged, or of other token ids."""
        record = self.read(key)
        if record is None or record.key != key or not record.tokens_equal(token_ids):
            return None
        return record

    def open(self, key: ChunkKey, token_ids: TokenIds) -> LayerReader | None:
        """Begin to read a record; ``None`` as of :meth:`get`.

        By default it is read whole. A tier that can read single layers returns at once, having compared the token ids.
        """
        return self.get(key, token_ids)

    def token_ids(self, key: ChunkKey) -> TokenIds | None:
        """Token ids of a record, ``None`` where it is damaged or gone; by default it is read whole for them."""
        record = self.read(key)
        return None if record is None else record.token_ids

    def seen_ids(self, key: ChunkKey) -> TokenIds | None:
        """:attr:`ChunkKV.seen_ids` of a record, in which erased text is looked for; ``None`` where it is damaged or gone.

        By default it is read whole for them.
        """
        record = self.read(key)
        return None if record is None else record.seen_ids

    def keys_by_use(self) -> list[ChunkKey]:
        """All keys, the longest unused first; by default in the order of :meth:`keys`."""
        return list(self.keys())

    def size_of(self, key: ChunkKey) -> int:
        """Bytes that a record takes there; 0 if it is absent, or as long as nobody knows."""
        return 0

    def sizes_of(self, keys: Sequence[ChunkKey]) -> list[int]:
        """:meth:`size_of` of many records, in one call."""
        return [self.size_of(key) for key in keys]

    def pinned_until(self, key: ChunkKey) -> float:
        """When a record's pin ends, seconds since the epoch: infinite for one without an end, 0 where there is none."""
        return 0.0

    def is_pinned(self, key: ChunkKey) -> bool:
        """Whether a record is kept whatever the budget says; loaded first, and pinned in memory too."""
        return self.pinned_until(key) > 0

    def pins(self) -> dict[ChunkKey, float]:
        """Records that are pinned, and until when (:meth:`pinned_until`); by default each is asked."""
        return {key: until for key in self.keys() if (until := self.pinned_until(key))}

    def pin(self, key: ChunkKey, *, ttl_s: float | None = None) -> bool:
        """Keep a record until :meth:`unpin`, or for so many seconds; ``False`` if it is not there.

        By default nothing is pinned: not every place can.
        """
        return False

    def unpin(self, key: ChunkKey) -> bool:
        """Make a record evictable again; ``False`` if it was not pinned."""
        return False

    def trim(self, byte_budget: int) -> list[ChunkKey]:
        """Remove records that are not pinned until the rest fits; returns what went.

        Raises
        ------
        ChunkCacheError
            If the tier cannot: by default none can.
        """
        raise ChunkCacheError("this tier keeps its budget itself: it cannot be trimmed")

    def sweep(self) -> int:
        """Remove what crashes left; returns how many. By default nothing is."""
        return 0

    def is_damaged(self, key: ChunkKey) -> bool:
        """Whether a record is there and cannot be read whole; it stays as it is."""
        return self.read(key) is None and self.contains(key)

    def verify(self, *, remove: bool = False) -> list[ChunkKey]:
        """Read every record and return the keys of damaged ones (:meth:`is_damaged`).

        With ``remove`` they are deleted, and what crashes left goes with them.
        """
        bad = [key for key in self.keys() if self.is_damaged(key)]
        if remove:
            self.sweep()
            for key in bad:
                self.remove(key)
        return bad

    def used(self, keys: Iterable[ChunkKey]) -> None:
        """Note that records were used just now, for :meth:`keys_by_use`; never raises."""
        return

    def heed_queue(self, awaited: Callable[[], Sequence[ChunkKey]]) -> None:
        """Let the waiting queue say what is evicted last, where a tier chooses that itself; by default none does.

        Parameters
        ----------
        awaited : callable
            Asked at each eviction, from the thread that makes room: keys that waiting requests will read, the next
            first. A hint: a wrong one costs hits only.
        """
        return

    def note_context(self, context: KVContext) -> None:
        """Keep what a namespace stands for, for :meth:`describe`."""
        return

    def describe(self, namespace: str) -> dict[str, Any] | None:
        """Fields of the :class:`KVContext` of a namespace and its ``tenant`` mark, or ``None`` if nobody told."""
        return None

    def namespaces(self, fields: Mapping[str, Any]) -> frozenset[str]:
        """Namespaces that are described with these fields; an engine reads no others at its start."""
        return frozenset(
            name
            for name in {key.namespace for key in self.keys()}
            if (found := self.describe(name)) is not None
            and all(found.get(field) == value for field, value in fields.items())
        )

    def note_member(self, group: str, key: ChunkKey) -> None:
        """Note that a record, which was written, belongs to a group that is found by its name.

        The records of a conversation are one: a place that is too large to be listed at every start still has to tell
        which they are. The name is a hash (32 hex digits) of contents, as a key is. Only the newest few hundred of a
        group are kept. What is removed or evicted need not be taken out: it is no member as long as it is not there.

        By default nothing is noted.

        Raises
        ------
        OSError, ChunkCacheError
            If the place refuses; the record itself is there.
        """
        return

    def members(self, group: str, known: Container[ChunkKey] = ()) -> list[Member]:
        """Records of a group that are there and not among the `known`, the one that was noted last at the end.

        What it tells may be wrong, as all that :meth:`describe` tells. By default none.
        """
        return []

    def tenant_of(self, namespace: str) -> str:
        """:func:`~.tenant_mark` of whom a namespace's records belong to; empty for nobody in particular.

        Their share of the budget goes by it, and whether a deletion reaches them.
        """
        tenant = (self.describe(namespace) or {}).get("tenant", "")
        return tenant if isinstance(tenant, str) else ""

    def sync(self) -> None:
        """Make removals survive a power cut; nothing to do where they do so by themselves."""
        return


TIERS: Registry[type[Tier]] = Registry(
    "tier",
    "rag_pipeline.tiers",
    {"disk": "chunk_cache.tiers.disk.folder:StoreFolder"},
    base=Tier,
)
"""Tiers by name, as the setting ``fusion.tier`` names them."""
