"""Attention of one MLA layer whose latents lie in slices on the ranks; stands in for SGLang's ``attn_mqa``.

What comes before (queries with ``w_kc`` absorbed, the latent behind its norm) and after (``w_vc``, the output projection
and the all-reduce) is SGLang's own, with heads sharded over ranks as ever. Per layer and step of decoding there are two
all-gathers more: of the ranks' queries, so that each rank attends with all heads on its slice; and of what they read, so
that each rank goes on with all of the latent for its own heads. The second one and ``w_vc`` are the sum over ranks:
``[o_1, o_2] w_vc = o_1 w_vc_1 + o_2 w_vc_2``. No weight is held twice for it.

Prefill is exact: queries attend with the whole latent, new tokens' as just computed, cached ones' gathered from the ranks.
A pass of chunk-KV fusion goes through SGLang's own layer, where fusion's hook takes it up.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_context import get_attn_backend, get_token_to_kv_pool
from torch import Tensor

from rag_kernels.attention.torch_sdpa import extend_attention
from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.pass_key import PASS_KEY
from rag_pipeline.sglang_plugin.tpla.slices import LatentSlices

__all__ = ["SlicedLatentAttention"]


class SlicedLatentAttention(torch.nn.Module):  # type: ignore[misc]
    """One layer's attention over this rank's slice of the latents.

    Parameters
    ----------
    whole : RadixAttention
        SGLang's ``attn_mqa``, over the whole latent with this rank's heads.
    group : GroupCoordinator
        The ranks of attention, in the order of the slices.
    dim : int
        Width of the whole latent.

    Attributes
    ----------
    whole : RadixAttention
        As given.
    slices : LatentSlices
        What lies where.
    """

    def __init__(self, whole: RadixAttention, group: Any, dim: int) -> None:
        super().__init__()
        self._group, self._dim = group, dim
        self.whole, self.slices = whole, LatentSlices(group=group, dim=dim)
        self._own, self.width = self.slices.own, self.slices.width
        self._heads = whole.tp_q_head_num
        self._scale = whole.scaling
        self.sliced = RadixAttention(
            whole.tp_q_head_num * group.world_size,
            self.width + whole.qk_head_dim - dim,
            whole.scaling,
            num_kv_heads=1,
            layer_id=whole.layer_id,
            v_head_dim=self.width,
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **unserved: Any,
    ) -> Tensor:
        """Attend; parameters of ``RadixAttention.forward``.

        Parameters
        ----------
        q : Tensor
            ``[T, H, D + R]``, this rank's heads, absorbed and rotated.
        k, v : Tensor
            ``[T, 1, D + R]`` and ``[T, 1, D]``, whole: each rank computes them.
        forward_batch : ForwardBatch
            SGLang's.
        save_kv_cache : bool
            Whether this rank's slice is written to its pool.
        **unserved : object
            What only other backends know.

        Returns
        -------
        Tensor
            ``[T, H, D]``, this rank's heads over the whole latent.
        """
        if PASS_KEY in (forward_batch.model_specific_states or ()):
            fused: Tensor = self.whole(q, k, v, forward_batch, save_kv_cache, **unserved)
            return fused.view(-1, self._heads, self._dim)
        given = [name for name, value in unserved.items() if value is not None]
        if given:
            raise EngineError(f"latents in slices do not serve {', '.join(given)}")
        q = q.reshape(-1, self._heads, k.shape[-1])
        k_slice = torch.cat([v[..., self._own], k[..., self._dim :]], -1)
        mode = forward_batch.forward_mode
        if mode.is_decode():
            return self._decode(q, k_slice, forward_batch, save_kv_cache)
        if mode.is_idle():
            return q[..., : self._dim]
        if save_kv_cache:
            where = KVWriteLoc(forward_batch.out_cache_loc, None)
            get_token_to_kv_pool().set_kv_buffer(
                self.sliced, where, k_slice, k_slice[..., : self.width]
            )
        return self._extend(q, k)

    def _decode(self, q: Tensor, k_slice: Tensor, batch: Any, save: bool) -> Tensor:
        every = self._group.all_gather(q.contiguous(), dim=1)
        query = torch.cat([every[..., self._own], every[..., self._dim :]], -1)
        read = self.sliced(query, k_slice, k_slice[..., : self.width], batch, save)
        read = read.view(len(query), -1, self.width).contiguous()
        first = self._group.rank_in_group * self._heads
        whole: Tensor = self._group.all_gather(read, dim=-1)
        return whole[:, first : first + self._heads]

    def _extend(self, q: Tensor, k: Tensor) -> Tensor:
        spans = get_attn_backend().extend_spans
        buffer = get_token_to_kv_pool().get_key_buffer(self.sliced.layer_id)
        cached = [buffer[span.slots][: -(span.stop - span.start)] for span in spans]
        whole = self.slices.whole(torch.cat(cached).to(q.dtype)) if cached else k[:0]
        out = q.new_zeros(*q.shape[:2], self._dim)
        for span, prefix in zip(spans, whole.split([len(part) for part in cached]), strict=True):
            rows = slice(span.start, span.stop)
            keys = torch.cat([prefix, k[rows]])
            out[rows] = extend_attention(q[rows], keys, keys[..., : self._dim], scale=self._scale)
        return out
