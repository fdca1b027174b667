"""One latent and one rotated position part per token, for all heads: multi-head latent attention (MLA)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chunk_cache.errors import ChunkCacheError
from chunk_cache.layouts.heads import HeadsLayout

if TYPE_CHECKING:
    from chunk_cache.records import ChunkKV


class LatentLayout(HeadsLayout):
    """Position parts ``[L, T, 1, R]`` as ``k``, latents ``[L, T, 1, C]`` as ``v``; in the pool one row ``[latent, position part]``.

    The two lie apart in a record because only the position part is turned when a chunk moves: latents are stored and
    loaded bit for bit. Attention is computed in the absorbed form (DeepSeek-V2, https://arxiv.org/abs/2405.04434): a
    query of ``C + R`` dimensions reads the whole row as its key, and the latent as its value.
    """

    name = "latent"
    reads_rows = True

    def refuse_pool(self, pool: Any) -> str | None:
        """Accept SGLang's plain latent pool, by the name of its type."""
        if type(pool).__name__ != "MLATokenToKVPool":
            return "latent takes pools of one latent per token only"
        rows = int(pool.kv_lora_rank) + int(pool.qk_rope_head_dim)
        if getattr(pool, "use_dsa", False) or int(pool.kv_cache_dim) != rows:
            return f"rows of {pool.kv_cache_dim} instead of {rows}: sparse or packed latents are refused"
        return None

    def check(self, record: ChunkKV) -> None:
        """Check that position parts and latents are those of one head."""
        super().check(record)
        if record.k.shape[2] != 1:
            raise ChunkCacheError(
                f"{record.k.shape[2]} heads: a latent is one for all of them, give 1"
            )

    def pool_layer(self, pool: Any, layer: int) -> tuple[Tensor, Tensor]:
        """Return views of the position parts and of the latents."""
        rows, latents = pool.get_key_buffer(layer), pool.get_value_buffer(layer)
        return rows[..., latents.shape[-1] :], latents

    def attended(self, pool: Any, layer: int) -> tuple[Tensor, Tensor]:
        """Return whole rows, twice: kernels want values as wide as keys, and what is behind the latent is cut off."""
        rows = pool.get_key_buffer(layer)
        return rows, rows

    def new_rows(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the position parts and the latents of computed rows."""
        return k[..., v.shape[-1] :], v

    def keys(self, rotated: Tensor, rest: Tensor) -> Tensor:
        """Return whole rows, as queries score them."""
        return torch.cat([rest, rotated], dim=-1)
