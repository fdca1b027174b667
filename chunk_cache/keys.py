"""What a chunk's KV is a function of, and the key made from it.

The KV of a token run depends on far more than its text: weights, number formats, RoPE parameters, the
model's configuration, the prefix it was computed behind, the head shard of this rank. :class:`KVContext` names all
of it, and :class:`ChunkKey` is a BLAKE2b hash over the context *and* the token ids, so KV made under
other conditions cannot be found by accident. This module needs NumPy only.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunk_cache.errors import ChunkCacheError

STORE_FORMAT_VERSION = 2
"""Raised whenever the meaning of stored bytes changes; part of every key."""

TokenIds = npt.NDArray[np.int32]
"""Checked token ids: int32 ``[T]``, C-contiguous, read-only."""

PromptIds = npt.NDArray[np.int64]
"""Token ids of a whole prompt: int64 ``[N]``. Engines put ids past int32 there (image pads)."""

_MAX_TOKEN_ID = 2**31 - 1
_NAMESPACE_BYTES = 16
_DIGEST_BYTES = 32


def as_token_ids(ids: Iterable[int] | npt.NDArray[Any]) -> TokenIds:
    """Check and freeze the token ids of a chunk.

    Parameters
    ----------
    ids : iterable of int or ndarray
        Integers in ``[0, 2**31)``; a list, an integer array or anything NumPy reads as one.

    Returns
    -------
    numpy.ndarray
        int32 ``[T]``, C-contiguous and not writeable. A read-only int32 array is returned as it is.

    Raises
    ------
    ChunkCacheError
        For an empty run, floats, more than one dimension, or an id out of range.
    """
    if isinstance(ids, np.ndarray):
        array = ids
        # Frozen means that nobody can write to the memory by another name either.
        owner = array.base
        frozen_already = (
            array.dtype == np.int32
            and array.flags.c_contiguous
            and not array.flags.writeable
            and (owner is None or (isinstance(owner, np.ndarray) and not owner.flags.writeable))
        )
        if frozen_already and array.ndim == 1 and array.size and int(array.min()) >= 0:
            return array  # the fast path of every look-up: nothing left to check or to copy
    else:
        array = np.asarray(ids if isinstance(ids, Sequence) else list(ids))
    if array.ndim != 1 or array.size == 0:
        raise ChunkCacheError(
            f"token ids of shape {list(array.shape)}: give at least one id in one dimension"
        )
    if array.dtype.kind not in "iu":
        raise ChunkCacheError(f"token ids of dtype {array.dtype}: give integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > _MAX_TOKEN_ID:
        raise ChunkCacheError(f"token ids from {low} to {high}: allowed is 0 to {_MAX_TOKEN_ID}")
    frozen = np.array(array, dtype=np.int32, order="C", copy=True)
    frozen.flags.writeable = False
    return frozen


def as_prompt_ids(ids: Iterable[int] | npt.NDArray[Any]) -> PromptIds:
    """Read the ids of a prompt as int64 ``[N]``; empty is allowed, any integer value is allowed.

    Raises
    ------
    ChunkCacheError
        For floats, values past 64 bits, or more than one dimension.
    """
    try:
        array = np.asarray(ids if isinstance(ids, (Sequence, np.ndarray)) else list(ids))
        if array.size == 0:
            return np.zeros(0, dtype=np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ChunkCacheError(
                f"prompt ids of dtype {array.dtype} and shape {list(array.shape)}: "
                "give integers in one dimension"
            )
        return np.ascontiguousarray(array, dtype=np.int64)
    except OverflowError as error:
        raise ChunkCacheError(f"prompt ids past 64 bits: {error}") from None


def hash_token_ids(ids: Iterable[int] | npt.NDArray[Any]) -> str:
    """Hash a token sequence, for example the shared prefix chunks are computed behind.

    Parameters
    ----------
    ids : iterable of int or ndarray
        Token ids; may be empty (no prefix at all).

    Returns
    -------
    str
        64 hex digits of BLAKE2b over the number of ids and the ids as little-endian int64.
    """
    array = as_prompt_ids(ids)
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"ragkv-ids")
    digest.update(struct.pack("<Q", array.size))
    digest.update(array.astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def canonical_json(value: Mapping[str, Any]) -> str:
    """Write a mapping (RoPE parameters, say) the same way whatever order its keys came in.

    Raises
    ------
    ChunkCacheError
        For values JSON has no exact form for: NaN, infinity, objects.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ChunkCacheError(
            f"cannot write {value!r} as JSON ({error}): give plain numbers, strings, lists and maps"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KVContext:
    """Everything except the token ids that decides what a chunk's KV is.

    Two engines that differ in any field never see each other's chunks. The fields are plain strings
    and integers, so that a context can be written to JSON and compared between processes.
    """

    model_fingerprint: str
    """Identifies the weights: a hash of the files, not a name that may be re-used for others."""
    dtype: str
    """Compute dtype of the model, as in ``bfloat16``."""
    kv_dtype: str
    """Dtype of the stored keys and values."""
    rope: str
    """RoPE parameters as :func:`canonical_json` (base, rotary dim, scaling, interleaving)."""
    prefix_digest: str
    """:func:`hash_token_ids` of the shared prefix the chunks are computed behind."""
    settings: str = ""
    """Everything else that changes KV: a digest of the model's configuration and the engine's settings."""
    tenant: str = ""
    """Salt of the tenant: chunks of one tenant are invisible to another. May be a secret."""
    tp_rank: int = 0
    """Rank in the attention tensor-parallel group: each rank stores its own head shard."""
    tp_size: int = 1
    format_version: int = STORE_FORMAT_VERSION

    def __post_init__(self) -> None:
        """Reject what would make two different situations look the same."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wanted = int if field.name in ("tp_rank", "tp_size", "format_version") else str
            if type(value) is not wanted:
                raise ChunkCacheError(
                    f"KVContext.{field.name}={value!r}: give {'an int' if wanted is int else 'a str'}"
                )
        for name in ("model_fingerprint", "dtype", "kv_dtype", "rope", "prefix_digest"):
            if not getattr(self, name):
                raise ChunkCacheError(f"KVContext.{name} is empty: chunks of any model would mix")
        if not 0 <= self.tp_rank < self.tp_size:
            raise ChunkCacheError(
                f"KVContext.tp_rank={self.tp_rank} of tp_size={self.tp_size}: "
                "allowed is 0 to tp_size - 1"
            )
        if self.format_version < 1:
            raise ChunkCacheError(
                f"KVContext.format_version={self.format_version}: allowed is >= 1"
            )

    def encode(self) -> bytes:
        """Encode every field with its name and length, so no two contexts share an encoding."""
        parts = [struct.pack("<I", len(dataclasses.fields(self)))]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # The type is encoded too: "1" and 1 are different values.
            is_int = isinstance(value, int)
            tag = b"i" if is_int else b"s"
            data = str(value).encode("utf-8", "surrogatepass")
            name = field.name.encode()
            parts += [struct.pack("<I", len(name)), name, tag, struct.pack("<Q", len(data)), data]
        return b"".join(parts)

    @property
    def namespace(self) -> str:
        """32 hex digits: BLAKE2b-128 of :meth:`encode`. Matching never leaves a namespace."""
        return _namespace_of(self)

    def to_json(self) -> dict[str, str | int]:
        """Return the fields as a JSON-ready dict; the tenant salt is included."""
        return dataclasses.asdict(self)


@functools.lru_cache(maxsize=256)
def _namespace_of(context: KVContext) -> str:
    """Hash a context once: it is asked for on every request."""
    digest = hashlib.blake2b(
        context.encode(), digest_size=_NAMESPACE_BYTES, person=b"ragkv-context"
    )
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkKey:
    """Name of one chunk's KV: a hash over its context and its token ids.

    Make one with :meth:`of`. ``digest`` alone decides equality of content; ``namespace`` and
    ``num_tokens`` ride along for listings and are themselves part of what was hashed.
    """

    namespace: str
    """:attr:`KVContext.namespace`, 32 hex digits."""
    digest: str
    """64 hex digits of BLAKE2b over namespace, number of ids and the ids."""
    num_tokens: int

    @classmethod
    def of(cls, context: KVContext | str, token_ids: Iterable[int] | npt.NDArray[Any]) -> ChunkKey:
        """Key of ``token_ids`` computed under ``context``.

        Parameters
        ----------
        context : KVContext or str
            The context, or its :attr:`KVContext.namespace` when that is at hand already.
        token_ids : iterable of int or ndarray
            Ids of the chunk, as in :func:`as_token_ids`.
        """
        namespace = context if isinstance(context, str) else context.namespace
        if len(namespace) != 2 * _NAMESPACE_BYTES:
            raise ChunkCacheError(f"namespace {namespace!r}: give KVContext.namespace")
        ids = as_token_ids(token_ids)
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"ragkv-chunk")
        digest.update(bytes.fromhex(namespace))
        digest.update(struct.pack("<Q", ids.size))
        digest.update(ids.astype("<i4", copy=False).tobytes())
        return cls(namespace, digest.hexdigest(), int(ids.size))

    def __str__(self) -> str:
        return self.digest


def keys_named(keys: Iterable[ChunkKey], words: Sequence[str]) -> tuple[list[ChunkKey], list[str]]:
    """Find keys by the first digits of their digests, as people name them.

    Parameters
    ----------
    keys : iterable of ChunkKey
        Among which.
    words : sequence of str
        First digits, or whole digests.

    Returns
    -------
    found : list[ChunkKey]
        Keys that begin with any of the words, in the order of `keys`.
    unknown : list[str]
        Words that begin none; an empty one is among them.
    """
    held = list(keys)
    digests = sorted(key.digest for key in held)
    named: set[str] = set()
    unknown: list[str] = []
    for word in words:
        start = end = bisect.bisect_left(digests, word)
        while word and end < len(digests) and digests[end].startswith(word):
            end += 1
        named.update(digests[start:end])
        if start == end:
            unknown.append(word)
    return [key for key in held if key.digest in named], unknown
