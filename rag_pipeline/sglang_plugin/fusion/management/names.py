"""From the first digits of a key to records, and from one rank's records to another's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from chunk_cache import ChunkKey
from rag_pipeline.protocol.cache_order import CacheOrder, CacheOrderError
from rag_pipeline.sglang_plugin.fusion.management.view import listed_tiers

if TYPE_CHECKING:
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


class _Meaning(NamedTuple):
    """A chunk without the rank whose shard a key names."""

    prefix_digest: str
    tenant: str
    token_ids: list[int]


class Names:
    """Keys of one scheduler process.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    """

    def __init__(self, runtime: FusionRuntime) -> None:
        self._runtime = runtime

    def find(self, order: CacheOrder) -> list[ChunkKey]:
        """Keys that begin with any of an order's words, in memory or in a tier that is listed.

        Raises
        ------
        CacheOrderError
            404 for a word that begins none.
        """
        if not order.keys:
            return []
        keys = self._keys()
        digests = [key.digest for key in keys]
        unknown = [w for w in order.keys if not w or not any(d.startswith(w) for d in digests)]
        if unknown:
            named = ", ".join(ascii(word[:64]) for word in unknown[:5])
            raise CacheOrderError(f"no chunk's key begins with {named}; `ls` lists the keys", 404)
        return [key for key in keys if key.digest.startswith(order.keys)]

    def shared(self, order: CacheOrder) -> list[ChunkKey]:
        """Keys of this rank for the chunks that an order names on rank 0; a vote.

        Raises
        ------
        CacheOrderError
            404 on every rank, as of :meth:`find` on rank 0.
        """

        def told() -> tuple[str, list[_Meaning]]:
            if self._runtime.group.rank:
                return "", []
            try:
                meanings = [self._meaning(key) for key in self.find(order)]
            except CacheOrderError as error:
                return str(error), []
            return "", [meaning for meaning in meanings if meaning is not None]

        error, meanings = self._runtime.group.gather(told)[0]
        if error:
            raise CacheOrderError(error, 404)
        spaces = {self._fields(name): name for name in {key.namespace for key in self._keys()}}
        return [
            ChunkKey.of(spaces[meaning[:2]], meaning.token_ids)
            for meaning in meanings
            if meaning[:2] in spaces
        ]

    def _keys(self) -> list[ChunkKey]:
        keys = dict.fromkeys(self._runtime.store.keys())
        for tier in listed_tiers(self._runtime).values():
            keys.update(dict.fromkeys(tier.keys()))
        return list(keys)

    def _meaning(self, key: ChunkKey) -> _Meaning | None:
        with self._runtime.store.borrow(key) as record:
            ids: Any = None if record is None else record.token_ids
        if ids is None and self._runtime.tiers is not None:
            ids = self._runtime.tiers.token_ids(key)
        return None if ids is None else _Meaning(*self._fields(key.namespace), ids.tolist())

    def _fields(self, namespace: str) -> tuple[str, str]:
        known, chain = self._runtime.prefix_of(namespace), self._runtime.tiers
        if known is not None:
            return known.context.prefix_digest, known.tenant.owner
        fields = (None if chain is None else chain.describe(namespace)) or {}
        # A namespace that nobody describes is its own and no other rank's.
        return str(fields.get("prefix_digest", namespace)), str(fields.get("tenant", ""))
