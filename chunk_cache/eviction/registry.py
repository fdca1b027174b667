"""From ``name`` or ``name:variant`` to an eviction policy."""

from __future__ import annotations

from chunk_cache.eviction.base import EvictionPolicy
from rag_kernels import Registry

EVICTIONS: Registry[type[EvictionPolicy]] = Registry(
    "eviction policy",
    "rag_pipeline.evictions",
    {
        "lru": "chunk_cache.eviction.lru:LRUPolicy",
        "lfu": "chunk_cache.eviction.lfu:LFUPolicy",
        "fifo": "chunk_cache.eviction.fifo:FIFOPolicy",
        "lookahead": "chunk_cache.eviction.lookahead:LookAheadPolicy",
        "belady": "chunk_cache.eviction.belady:BeladyPolicy",
    },
    base=EvictionPolicy,
)
"""Eviction policies by name; the setting ``fusion.eviction`` names one."""

DEFAULT_EVICTION = "lru"


def create_eviction(name: str, *, memory_bytes: int, disk_bytes: int = 0) -> EvictionPolicy:
    """Make a policy for an engine.

    Parameters
    ----------
    name : str
        ``lru``, ``lfu``, ``fifo``, ``lookahead``, or ``lookahead:VARIANT``.
    memory_bytes, disk_bytes : int
        Budgets, as of :class:`EvictionPolicy`.

    Raises
    ------
    ValueError
        An unknown name or variant, a policy that needs to know the future, or one that cannot be made; one line.
    """
    base, _, variant = name.partition(":")
    if base not in EVICTIONS.names():
        raise ValueError(f"eviction policy {base!r} is not known; choose one of {_usable()}.")
    policy_type = EVICTIONS.get(base)
    if policy_type.needs_future:
        raise ValueError(
            f"eviction policy {base!r} must know what will be asked for, so it runs in `rag-pipeline simulate tiers` "
            f"only; choose one of {_usable()}."
        )
    try:
        return policy_type(memory_bytes=memory_bytes, disk_bytes=disk_bytes, variant=variant)
    except ValueError:
        raise
    except Exception as error:  # of another distribution
        told = " ".join(repr(error).split())
        raise ValueError(f"eviction policy {name!r} cannot be made: {told}") from error


def _usable() -> str:
    """What an engine may be given, with variants."""
    words = []
    for name in EVICTIONS.names():
        try:
            policy_type = EVICTIONS.get(name)
        except ValueError:  # it could not be used
            continue
        if not policy_type.needs_future:
            words += [name, *(f"{name}:{variant}" for variant in policy_type.variants)]
    return ", ".join(words)
