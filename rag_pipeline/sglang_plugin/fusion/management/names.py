"""From the first digits of a key to records, and from one rank's records to another's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from chunk_cache import ChunkKey, keys_named
from rag_pipeline.protocol.cache_order import CacheOrder, CacheOrderError
from rag_pipeline.sglang_plugin.fusion.management.view import known_prefix, listed_tiers

if TYPE_CHECKING:
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


class _Meaning(NamedTuple):
    """A chunk of this model, without the rank whose shard a key names."""

    prefix_digest: str
    tenant: str
    token_ids: list[int]


_Space = tuple[str, str]
"""What is the same on every rank of a namespace: prefix and tenant."""


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
        found, unknown = keys_named(self._keys(), order.keys)
        if unknown:
            named = ", ".join(ascii(word[:64]) for word in unknown[:5])
            raise CacheOrderError(f"no chunk's key begins with {named}; `ls` lists the keys", 404)
        return found

    def shared(self, order: CacheOrder) -> list[ChunkKey]:
        """Keys of this rank for the chunks that an order names on rank 0; a vote.

        What rank 0 names of other models, or of another rank, it has for itself.

        Raises
        ------
        CacheOrderError
            404 on every rank, as of :meth:`find` on rank 0.
        """
        own: list[ChunkKey] = []

        def told() -> tuple[str, list[_Meaning]]:
            if self._runtime.group.rank:
                return "", []
            try:
                own.extend(self.find(order))
            except CacheOrderError as error:
                return str(error), []
            meanings = [self._meaning(key) for key in own]
            return "", [meaning for meaning in meanings if meaning is not None]

        error, meanings = self._runtime.group.gather(told)[0]
        if error:
            raise CacheOrderError(error, 404)
        if self._runtime.group.rank == 0:
            return own
        spaces = {self._space(name): name for name in {key.namespace for key in self._keys()}}
        return [
            ChunkKey.of(spaces[meaning.prefix_digest, meaning.tenant], meaning.token_ids)
            for meaning in meanings
            if (meaning.prefix_digest, meaning.tenant) in spaces
        ]

    def _keys(self) -> list[ChunkKey]:
        keys = dict.fromkeys(self._runtime.store.keys())
        for tier in listed_tiers(self._runtime).values():
            keys.update(dict.fromkeys(tier.keys()))
        return list(keys)

    def _meaning(self, key: ChunkKey) -> _Meaning | None:
        space = self._space(key.namespace)
        if space is None:
            return None
        with self._runtime.store.borrow(key) as record:
            ids: Any = None if record is None else record.token_ids
        if ids is None and self._runtime.tiers is not None:
            ids = self._runtime.tiers.token_ids(key)
        return None if ids is None else _Meaning(*space, ids.tolist())

    def _space(self, namespace: str) -> _Space | None:
        """Prefix and tenant of a namespace of this model and rank; None for another's, and where nobody tells."""
        known, chain = known_prefix(self._runtime, namespace), self._runtime.tiers
        if known is not None:
            return known.context.prefix_digest, known.tenant.owner
        fields = (None if chain is None else chain.describe(namespace)) or {}
        facts = self._runtime.facts
        mine = {} if facts is None else facts.context_fields
        if not fields or any(fields.get(name) != value for name, value in mine.items()):
            return None
        return str(fields["prefix_digest"]), str(fields.get("tenant", ""))
