"""From ``NAME`` or ``NAME:OPTION=VALUE+OPTION=VALUE`` to a retention rule."""

from __future__ import annotations

from functools import lru_cache

from chunk_cache.retention.base import RetentionRule
from rag_kernels import Registry
from rag_kernels.options import create_named

RETENTION_RULES: Registry[type[RetentionRule]] = Registry(
    "retention rule",
    "rag_pipeline.retention_rules",
    {
        "epicache": "chunk_cache.retention.epicache:EpiCacheRule",
        "snapkv": "chunk_cache.retention.snapkv:SnapKVRule",
        "keydiff": "chunk_cache.retention.keydiff:KeyDiffRule",
        "kvzip": "chunk_cache.retention.kvzip:KVzipRule",
        "random": "chunk_cache.retention.random:RandomRule",
        "streaming": "chunk_cache.retention.streaming:StreamingRule",
    },
    base=RetentionRule,
)
"""Rules by name. A client names one in its request; each process that reads it must know it."""


def create_rule(text: str) -> RetentionRule:
    """Make a rule; the one of the same text where it was made before, since a rule keeps nothing between calls.

    Parameters
    ----------
    text : str
        A name in :data:`RETENTION_RULES`, with options behind a colon: ``snapkv:window=32+kernel=7``.

    Raises
    ------
    ValueError
        An unknown name or option, a wrong type or value; one line that says what is allowed.
    """
    return _created(RETENTION_RULES.get(text.partition(":")[0]), text)


@lru_cache(maxsize=256)
def _created(kind: type[RetentionRule], text: str) -> RetentionRule:
    """Make a rule once; by its class too, as a name may be registered anew."""
    return create_named(RETENTION_RULES, text)
