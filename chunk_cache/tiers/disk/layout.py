"""What lies where in the folder of a store.

::

    store.json                                       format name and version
    <namespace>/context.json                         what the namespace stands for (no tenant's salt)
    <namespace>/<2 hex>/<digest>-<tokens>.safetensors
    <namespace>/<2 hex>/<digest>-<tokens>.pinned     empty; the record beside it is pinned

A pin is a file of its own, not a list in one file: several processes may pin and unpin at once, and
none of them undoes what another did.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from chunk_cache.errors import ChunkCacheError
from chunk_cache.keys import STORE_FORMAT_VERSION, ChunkKey, KVContext
from chunk_cache.tiers.disk.chunk_file import STORE_FORMAT
from chunk_cache.tiers.disk.private_files import write_private

_FILE_NAME = re.compile(r"([0-9a-f]{64})-([1-9][0-9]*)\.safetensors")
_NAMESPACE = re.compile(r"[0-9a-f]{32}")


def make_folder(folder: Path) -> None:
    """Make an empty store; one that is there stays as it is.

    Raises
    ------
    ChunkCacheError
        If something else is in the folder.
    """
    manifest = _manifest_path(folder)
    if manifest.exists():
        return
    # A process that was killed while it made the store leaves a temporary file.
    if folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir()):
        raise ChunkCacheError(f"{folder} is neither empty nor a chunk store: give another folder")
    fields = {"format": STORE_FORMAT, "version": STORE_FORMAT_VERSION}
    write_private(manifest, json.dumps(fields).encode())


def check_manifest(folder: Path) -> None:
    """Check that a folder is a store that this release reads.

    Raises
    ------
    ChunkCacheError
        If there is no such folder, it is not a chunk store, or one of another format version.
    """
    manifest = _manifest_path(folder)
    try:
        found = json.loads(manifest.read_bytes())
        kind, version = found["format"], found["version"]
    except FileNotFoundError:
        raise ChunkCacheError(
            f"{folder} is not a chunk store (no store.json): export one there first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ChunkCacheError(f"{manifest} cannot be read ({error}): export again") from None
    if kind != STORE_FORMAT or version != STORE_FORMAT_VERSION:
        raise ChunkCacheError(
            f"{manifest} says {kind!r} version {version!r}: this release reads {STORE_FORMAT!r} "
            f"version {STORE_FORMAT_VERSION}; export again"
        )


def chunk_path(folder: Path, key: ChunkKey) -> Path:
    """File of a record."""
    return folder / key.namespace / key.digest[:2] / f"{key.digest}-{key.num_tokens}.safetensors"


def pin_path(folder: Path, key: ChunkKey) -> Path:
    """File whose presence pins the record beside it."""
    return chunk_path(folder, key).with_suffix(".pinned")


def context_path(folder: Path, namespace: str) -> Path:
    """File that tells people what a namespace stands for."""
    return folder / namespace / "context.json"


def chunks_in(folder: Path) -> Iterator[ChunkKey]:
    """Keys of all chunk files, by namespace and name; nothing is opened."""
    for namespace in sorted(folder.iterdir()):
        if not _NAMESPACE.fullmatch(namespace.name):
            continue
        for file in sorted(namespace.glob("*/*.safetensors")):
            parts = _FILE_NAME.fullmatch(file.name)
            if parts is not None:
                yield ChunkKey(namespace.name, parts[1], int(parts[2]))


def tenant_mark(salt: str) -> str:
    """What stands in the folder for a tenant: a digest of its salt, empty for nobody in particular."""
    if not salt:
        return ""
    return hashlib.blake2b(salt.encode(), digest_size=16, person=b"ragkv-tenant").hexdigest()


def write_context(
    folder: Path, context: KVContext, model: str = "", *, tenant: str | None = None
) -> None:
    """Tell what a context's namespace stands for; of its tenant's salt only a digest.

    `model` is the folder of the model, whose tokenizer made the token ids. `tenant` is the :func:`tenant_mark` of
    whoever the records belong to, where that is more than the context's own salt.
    """
    mark = tenant_mark(context.tenant) if tenant is None else tenant
    fields = context.to_json() | {"tenant": mark, "model": model}
    data = json.dumps(fields, indent=1, sort_keys=True).encode()
    write_private(context_path(folder, context.namespace), data)


def _manifest_path(folder: Path) -> Path:
    return folder / "store.json"
