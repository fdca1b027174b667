"""What lies where in the folder of a store.

::

    store.json                                       format name and version
    usage                                            bytes of all records, see :mod:`~chunk_cache.tiers.disk.usage`
    <namespace>/context.json                         what the namespace stands for (no tenant's salt)
    <namespace>/<2 hex>/<digest>-<tokens>.safetensors
    <namespace>/<2 hex>/<digest>-<tokens>.pinned     the record beside it is pinned, see :mod:`~chunk_cache.tiers.disk.pins`

A pin is a file of its own, not a list in one file: several processes may pin and unpin at once, and
none of them undoes what another did.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path

from chunk_cache.errors import ChunkCacheError
from chunk_cache.keys import STORE_FORMAT_VERSION, ChunkKey, KVContext
from chunk_cache.tiers.disk.private_files import write_private
from chunk_cache.tiers.encoding import STORE_FORMAT

_FILE_NAME = re.compile(r"([0-9a-f]{64})-([1-9][0-9]*)\.safetensors")
PIN_SUFFIX = ".pinned"
_NAMESPACE = re.compile(r"[0-9a-f]{32}")


def make_folder(folder: Path) -> None:
    """Make an empty store; one that is there stays as it is, and one of an older format version is emptied.

    Records of an older version have other keys, so nobody would ever find them.

    Raises
    ------
    ChunkCacheError
        If something else is in the folder.
    """
    manifest = _manifest_path(folder)
    if manifest.exists():
        if _is_older(manifest):
            for file in folder.glob("*/*/*"):
                if is_namespace(file.parts[-3]):
                    file.unlink(missing_ok=True)
            _write_manifest(manifest)
        return
    check_place(folder)
    _write_manifest(manifest)


def check_place(folder: Path) -> None:
    """Check that a store is at this path or could be made there; nothing is changed.

    Raises
    ------
    ChunkCacheError
        If a file is in the way, something else is in the folder, or a store of a later format version.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ChunkCacheError(f"{there} is a file, and chunk KV needs a folder: give another path")
    manifest = _manifest_path(folder)
    if manifest.exists():
        if not _is_older(manifest):
            check_manifest(folder)
    # A process that was killed while it made the store leaves a temporary file.
    elif folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir()):
        raise ChunkCacheError(f"{folder} is neither empty nor a chunk store: give another folder")


def holds_store(folder: Path) -> bool:
    """Whether a folder is a store of any version, so that records of ours may lie in it.

    Raises
    ------
    OSError
        Where the disk does not say: it is another user's, say.
    """
    try:
        found = json.loads(_manifest_path(folder).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        return True  # damage, perhaps; whoever opens it says so
    return not isinstance(found, dict) or found.get("format") == STORE_FORMAT


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
    except (FileNotFoundError, NotADirectoryError):
        raise ChunkCacheError(
            f"{folder} is not a chunk store (no store.json): nothing was stored there yet"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ChunkCacheError(f"{manifest} cannot be read ({error}): export again") from None
    if kind != STORE_FORMAT or version != STORE_FORMAT_VERSION:
        raise ChunkCacheError(
            f"{manifest} says {kind!r} version {version!r}: this release reads {STORE_FORMAT!r} "
            f"version {STORE_FORMAT_VERSION}; start an engine on it, which empties an older one, "
            "or export again"
        )


def chunk_path(folder: Path, key: ChunkKey) -> Path:
    """File of a record."""
    return folder / key.namespace / key.digest[:2] / f"{key.digest}-{key.num_tokens}.safetensors"


def pin_path(folder: Path, key: ChunkKey) -> Path:
    """File whose presence pins the record beside it."""
    return chunk_path(folder, key).with_suffix(PIN_SUFFIX)


def context_path(folder: Path, namespace: str) -> Path:
    """File that tells people what a namespace stands for."""
    return folder / namespace / "context.json"


def usage_path(folder: Path) -> Path:
    """File that all processes count the folder's bytes in."""
    return folder / "usage"


def is_namespace(name: str) -> bool:
    """Whether a folder of this name holds records."""
    return _NAMESPACE.fullmatch(name) is not None


def chunk_of(namespace: str, name: str) -> ChunkKey | None:
    """Key of the record in a file of this name; ``None`` if it is another kind of file."""
    parts = _FILE_NAME.fullmatch(name)
    return None if parts is None else ChunkKey(namespace, parts[1], int(parts[2]))


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


def _write_manifest(manifest: Path) -> None:
    fields = {"format": STORE_FORMAT, "version": STORE_FORMAT_VERSION}
    write_private(manifest, json.dumps(fields).encode())


def _is_older(manifest: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(manifest.read_bytes())
        return bool(found["format"] == STORE_FORMAT and found["version"] < STORE_FORMAT_VERSION)
    return False
