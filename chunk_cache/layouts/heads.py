"""Keys and values by head: multi-head and grouped-query attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from chunk_cache.errors import ChunkCacheError
from chunk_cache.layouts.base import KVLayout

if TYPE_CHECKING:
    from chunk_cache.records import ChunkKV


class HeadsLayout(KVLayout):
    """Rotated keys ``[L, T, H, D]`` and plain values ``[L, T, H, D_v]``."""

    name = "heads"

    def refuse_pool(self, pool: Any) -> str | None:
        """Accept SGLang's plain multi-head pool, by the name of its type."""
        if type(pool).__name__ == "MHATokenToKVPool":
            return None
        return f"{self.name} takes plain multi-head pools only (no sliding window, no hybrid)"

    def check(self, record: ChunkKV) -> None:
        """Check that K and V differ in the head size at most."""
        k, v, num_tokens = record.k, record.v, record.token_ids.size
        for name, tensor in (("k", k), ("v", v)):
            if tensor.ndim != 4 or tensor.shape[1] != num_tokens or not tensor.is_contiguous():
                raise ChunkCacheError(
                    f"{name} of shape {list(tensor.shape)} for {num_tokens} tokens: "
                    "give a contiguous [layers, tokens, kv_heads, head_dim]"
                )
            if not tensor.is_floating_point():
                raise ChunkCacheError(f"{name} of dtype {tensor.dtype}: quantised KV is refused")
        if k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
            raise ChunkCacheError(
                f"k {list(k.shape)} {k.dtype} and v {list(v.shape)} {v.dtype} "
                "differ in more than the head size"
            )
        if k.device != v.device:
            raise ChunkCacheError(f"k on {k.device} and v on {v.device}: use one device")

    def pool_layer(self, pool: Any, layer: int) -> tuple[Tensor, Tensor]:
        """Return the key and the value buffer of a layer."""
        return pool.get_key_buffer(layer), pool.get_value_buffer(layer)
