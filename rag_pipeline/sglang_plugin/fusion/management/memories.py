"""Which memories of conversations an engine has, by their ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.protocol.cache_order import CacheOrder
from rag_pipeline.sglang_plugin.fusion.management.view import listed_tiers
from rag_pipeline.sglang_plugin.fusion.memory.records import id_of, name_of

if TYPE_CHECKING:
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


def memories(runtime: FusionRuntime, order: CacheOrder) -> dict[str, list[str]]:
    """Of the ids that an order names, those whose record is in memory or in a tier that is listed, and the others.

    A store that several servers share is not looked through: what only lies there counts as absent, and is found all
    the same by the request that loads it.
    """
    there: set[str] = set()
    for key in runtime.store.keys():  # noqa: SIM118 - a list, not a mapping
        with runtime.store.borrow(key) as record:
            name = None if record is None else name_of(record)
        if name is not None and order.tenant in (None, runtime.store.tenant_of(key)):
            there.add(name)
    for tier in listed_tiers(runtime).values():
        for namespace in {key.namespace for key in tier.keys()}:  # noqa: SIM118 - not a mapping
            name = id_of((tier.describe(namespace) or {}).get("prefix_digest"))
            if name is not None and order.tenant in (None, tier.tenant_of(namespace)):
                there.add(name)
    return {
        "present": [name for name in order.keys if name in there],
        "absent": [name for name in order.keys if name not in there],
    }
