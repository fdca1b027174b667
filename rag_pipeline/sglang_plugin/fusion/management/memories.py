"""Which memories of conversations an engine has, by their ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
    # Of other weights than those of the start no tier has anything.
    for tier in () if runtime.epoch else listed_tiers(runtime).values():
        for namespace in {key.namespace for key in tier.keys()}:  # noqa: SIM118 - not a mapping
            told = tier.describe(namespace) or {}
            name = id_of(told.get("prefix_digest"))
            if name is None or not _is_of_model(runtime, told):
                continue
            if order.tenant in (None, tier.tenant_of(namespace)):
                there.add(name)
    return {
        "present": [name for name in order.keys if name in there],
        "absent": [name for name in order.keys if name not in there],
    }


def _is_of_model(runtime: FusionRuntime, told: Mapping[str, Any]) -> bool:
    """Whether a namespace is of the loaded model: a folder holds those of others, and an id names token ids alone."""
    facts = runtime.facts
    return facts is not None and told.items() >= facts.context_fields.items()
