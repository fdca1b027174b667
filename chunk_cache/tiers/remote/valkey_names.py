"""Names of what lies in a Valkey server, and back from a name to a key."""

from __future__ import annotations

from chunk_cache.keys import ChunkKey
from chunk_cache.tiers.remote.valkey_client import PREFIX

RECORDS = f"{PREFIX}r:"
"""What the names of records begin with."""


def record_of(key: ChunkKey) -> str:
    """Name of a record."""
    return f"{RECORDS}{key.namespace}:{key.digest}:{key.num_tokens}"


def namespace_name(namespace: str) -> str:
    """Name of what a namespace stands for."""
    return f"{PREFIX}n:{namespace}"


def group_name(group: str) -> str:
    """Name of the list of a group."""
    return f"{PREFIX}t:{group}"


def key_named(name: bytes) -> ChunkKey | None:
    """Key of a record's name; ``None`` for what is not named as records are."""
    parts = name.decode("ascii", "replace").removeprefix(RECORDS).split(":")
    if len(parts) != 3 or not parts[2].isascii() or not parts[2].isdigit():
        return None
    space, digest, tokens = parts
    return ChunkKey(space, digest, int(tokens)) if (len(space), len(digest)) == (32, 64) else None
