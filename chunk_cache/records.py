"""The stored KV of one chunk: tensors, where they were computed, and a way to notice damage.

Shape letters: L layers, T tokens, H KV heads of this rank, D head size, R latent size.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch

from chunk_cache.codecs.base import codec_named
from chunk_cache.errors import ChunkCacheError
from chunk_cache.keys import ChunkKey, TokenIds, as_token_ids
from chunk_cache.layouts.base import LayerKV, layout_named
from chunk_cache.side_tensors import SEEN_IDS, freeze

_RECORD_OVERHEAD_BYTES = 1024
"""Charged per record for keys, fingerprints and Python objects, so tiny chunks are not free."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChunkKV:
    """KV of one chunk, shared by every request that uses it.

    Keys are stored exactly as they lay in the engine's pool, rotated for ``base_position``, and are
    rotated by the *difference* on load: un-rotating into bf16 first would round twice.

    Shared records are **read-only**. PyTorch cannot enforce that, so the tensors are handed out as
    views without gradient, and :meth:`verify` finds a writer by checksum. The maker gives the
    tensors away: it must not write to them after building the record.

    Parameters
    ----------
    key : ChunkKey
        Must be the key of ``token_ids``; the digest is recomputed to check it.
    token_ids : ndarray
        int32 ``[T]``.
    base_position : int
        Absolute position of the chunk's first token when the KV was computed (prefix length).
    k, v : Tensor
        ``[L, T, H, D]`` and ``[L, T, H, D_v]``, as the layout checks them.
    layout : str
        Name in :data:`chunk_cache.layouts.base.KV_LAYOUTS`: what the two tensors hold.
    codec : str
        Name in :data:`chunk_cache.codecs.base.CODECS`: what the KV went through since a model computed it. After a
        lossy one it is approximate, wherever it is copied to; see :attr:`is_lossless`.
    side : mapping of str to Tensor
        Small tensors on the host that say more of the tokens (:mod:`chunk_cache.side_tensors`). A record that has some is
        made from an earlier one, and another is made from it: tiers write it lossless, whatever their codec, so that
        no error grows along the chain.

    Raises
    ------
    ChunkCacheError
        If shapes, dtypes, devices, ids and key do not fit each other.
    """

    key: ChunkKey
    token_ids: TokenIds = dataclasses.field(repr=False)
    base_position: int
    k: torch.Tensor = dataclasses.field(repr=False)
    v: torch.Tensor = dataclasses.field(repr=False)
    layout: str = "heads"
    checksum: str | None = None
    """Set by :meth:`sealed`; ``None`` means nobody asked for one."""
    codec: str = "plain"
    side: Mapping[str, torch.Tensor] = dataclasses.field(
        default_factory=lambda: MappingProxyType({}), repr=False
    )

    def __post_init__(self) -> None:
        layout = layout_named(self.layout)
        ids = as_token_ids(self.token_ids)
        object.__setattr__(self, "token_ids", ids)
        if ChunkKey.of(self.key.namespace, ids) != self.key:
            raise ChunkCacheError(f"key {self.key} does not belong to these {ids.size} token ids")
        if self.base_position < 0:
            raise ChunkCacheError(f"base_position={self.base_position}: allowed is >= 0")
        layout.check(self)
        codec_named(self.codec)
        object.__setattr__(self, "k", self.k.detach())
        object.__setattr__(self, "v", self.v.detach())
        object.__setattr__(self, "side", freeze(self.side))

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return int(self.k.shape[0])

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return int(self.k.shape[1])

    @property
    def num_bytes(self) -> int:
        """What the record is charged against a byte budget: tensors, ids and a fixed overhead."""
        tensors = layout_named(self.layout).num_bytes(self)
        beside = sum(tensor.nbytes for tensor in self.side.values())
        return int(tensors + beside + self.token_ids.nbytes + _RECORD_OVERHEAD_BYTES)

    @property
    def seen_ids(self) -> TokenIds:
        """Ids of all tokens that the KV was computed from: more than :attr:`token_ids` where the record says so."""
        return seen_ids(self.side, self.token_ids)

    @property
    def is_lossless(self) -> bool:
        """Whether the KV is bit for bit what the model computed. If not, nothing may take it for exact KV."""
        return codec_named(self.codec).is_lossless

    def layer(self, index: int, start: int = 0, end: int | None = None) -> LayerKV:
        """Return views of one layer's tokens ``[start, end)``; see :class:`LayerKV`."""
        return LayerKV(self.k[index, start:end], self.v[index, start:end])

    def tokens_equal(self, ids: np.ndarray[tuple[int], np.dtype[np.integer]]) -> bool:
        """Whether ``ids`` are exactly this chunk's tokens: the last word on every hit."""
        return bool(np.array_equal(self.token_ids, ids))

    def compute_checksum(self) -> str:
        """BLAKE2b-128 over shapes, dtypes, base position, ids and tensor bytes (about 1 GB/s)."""
        digest = hashlib.blake2b(digest_size=16, person=b"ragkv-record")
        header = (
            f"{self.layout}|{self.k.dtype}|{list(self.k.shape)}|{list(self.v.shape)}|"
            f"{self.base_position}|{self.key.digest}|"
        )
        digest.update(header.encode())
        digest.update(self.token_ids.tobytes())
        for name, tensor in sorted(self.side.items()):
            digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
            digest.update(tensor.numpy().tobytes())
        for tensor in (self.k, self.v):
            flat = tensor.detach().cpu().reshape(-1).view(torch.uint8)
            digest.update(memoryview(flat.numpy()))
        return digest.hexdigest()

    def sealed(self) -> ChunkKV:
        """Return the same record (same tensors) with its checksum taken now."""
        return dataclasses.replace(self, checksum=self.compute_checksum())

    def verify(self) -> bool:
        """Recompute the checksum: ``False`` if the tensors changed since :meth:`sealed`.

        Raises
        ------
        ChunkCacheError
            If the record was never sealed: there is nothing to compare with.
        """
        if self.checksum is None:
            raise ChunkCacheError(
                f"chunk {self.key} has no checksum: seal it (MemoryStore(checksums=True)) first"
            )
        return self.compute_checksum() == self.checksum


def seen_ids(side: Mapping[str, torch.Tensor], token_ids: TokenIds) -> TokenIds:
    """Ids of all text that the KV of a record was computed from, by its side tensors and its own token ids."""
    seen = side.get(SEEN_IDS)
    return token_ids if seen is None else as_token_ids(seen.numpy())
