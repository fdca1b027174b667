"""The attention backend ``rag_cpu``: paged pools of SGLang, arithmetic of :mod:`rag_kernels.attention.torch_sdpa`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import (
    ATTENTION_BACKENDS,
    register_attention_backend,
)
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from rag_kernels.attention.torch_sdpa import (
    decode_attention,
    extend_attention,
    packed_decode_attention,
    tree_attention,
)
from rag_kernels.attention.torch_softmax import written_out_attention
from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.cpu.backend_name import ATTENTION_BACKEND, offer_attention_backend
from rag_pipeline.sglang_plugin.cpu.decode_reads import DecodeReads, find_reads
from rag_pipeline.sglang_plugin.cpu.mla import absorb_always
from rag_pipeline.sglang_plugin.cpu.slot_plan import (
    PADDING_ALLOWED,
    ExtendSpan,
    SlotPlan,
    plan_kept_slots,
    plan_slots,
)

__all__ = [
    "DECODE",
    "RagCpuAttentionBackend",
    "decode_is_fast",
    "refusal",
    "register_backend",
]

DECODE = "RAG_PIPELINE_CPU_DECODE"
"""Environment variable: ``exact`` (default; the bits of SGLang's ``torch_native``) or ``fast``."""


def register_backend() -> None:
    """Register ``rag_cpu`` with SGLang's attention registry in this process. Idempotent."""
    offer_attention_backend()
    if ATTENTION_BACKEND not in ATTENTION_BACKENDS:
        register_attention_backend(ATTENTION_BACKEND)(RagCpuAttentionBackend)


def decode_is_fast() -> bool:
    """Whether ``RAG_PIPELINE_CPU_DECODE`` asks for the faster decode that may differ in a last bit.

    Raises
    ------
    EngineError
        For any value but ``exact`` (default) and ``fast``.
    """
    value = os.environ.get(DECODE, "exact")
    if value not in ("exact", "fast"):
        raise EngineError(f"{DECODE} is {value!r}; allowed are 'exact' and 'fast'.")
    return value == "fast"


def refusal(runner: Any) -> str | None:
    """Why this backend cannot serve the model of ``runner``, in one line; None when it can."""
    if runner.use_mla_backend and runner.server_args.speculative_algorithm:
        return (
            "trees of drafted tokens (speculative_algorithm) with multi-head latent attention (MLA)"
        )
    for module in runner.model.modules():
        if not isinstance(module, RadixAttention):
            continue
        if module.is_cross_attention:
            return "cross-attention to an encoder"
        if module.attn_type not in (AttentionType.DECODER, AttentionType.DECODER_BIDIRECTIONAL):
            return f"attention of type {module.attn_type.value!r}"
        if module.attn_type == AttentionType.DECODER_BIDIRECTIONAL:
            return "bidirectional attention inside the prompt"
        if module.logit_cap and module.logit_capping_method != "tanh":
            return f"a cap on attention logits by {module.logit_capping_method!r}"
        window = module.sliding_window_size
        has_window = window is not None and window > -1
        if runner.server_args.speculative_algorithm and (has_window or module.logit_cap):
            return "trees of drafted tokens (speculative_algorithm) in layers with a sliding window or a cap on logits"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _LayerCall:
    """One layer of a forward pass: where its keys and values lie, and which of them the batch reads."""

    layer: Any
    keys: torch.Tensor
    values: torch.Tensor
    window: int | None
    plan: SlotPlan
    cap: float | None
    sinks: torch.Tensor | None

    def read(
        self, slots: torch.Tensor | slice, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of slots; where values begin the same rows (latents), the whole rows, as wide as keys.

        What is behind the values has to be cut off the output: torch's fused attention takes equal widths only, and
        without it a decoded token takes 28 times as long as measured (1,400 keys of 320, bf16, one thread).
        """
        keys = self.keys[slots].to(dtype)
        if self.keys.data_ptr() == self.values.data_ptr():
            return keys, keys
        return keys, self.values[slots].to(dtype)

    def written_out(
        self, q_THD: torch.Tensor, slots: torch.Tensor | slice, window: int | None
    ) -> torch.Tensor:
        """Attention of a request's last tokens with the layer's cap and sinks."""
        return written_out_attention(
            q_THD,
            self.keys[slots].to(q_THD.dtype),
            self.values[slots].to(q_THD.dtype),
            scale=self.layer.scaling,
            window=window,
            logit_cap=self.cap,
            sinks=self.sinks,
        )

    @property
    def is_written_out(self) -> bool:
        """Whether torch's fused attention cannot compute the layer."""
        return self.cap is not None or self.sinks is not None


class RagCpuAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """Causal attention on a CPU whose cost grows with the new tokens only.

    SGLang's ``torch_native`` pads the queries of every extend to the whole sequence and decodes
    one request at a time. Here an extend computes its own rows only, slots that follow one another
    are read in place, and decode requests of one length share one call; with
    ``RAG_PIPELINE_CPU_DECODE=fast`` those of similar length do, several times faster and no longer
    bit for bit like ``torch_native``. Tokens of a request whose attention method acts on decoding
    read the positions that it keeps and no others, in layers without a sliding window.

    Grouped-query attention, sliding windows (also with SGLang's separate window pool), caps on logits,
    attention sinks, any page size and any KV dtype are served, and trees of drafted tokens (NGRAM speculation) in
    layers without a window, cap or sinks. Multi-head latent attention is served in its absorbed form (:mod:`.mla`).
    Encoders, cross-attention and draft models are refused with one line.
    """

    gathers_positions = True
    """Decode batches may say by :class:`~.decode_reads.DecodeReads` what their tokens read."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        reason = refusal(model_runner)
        if reason is not None:
            raise EngineError(
                f"the attention backend {ATTENTION_BACKEND!r} does not serve {reason}, which "
                f"{model_runner.model_config.model_path} uses; start with "
                "attention_backend='torch_native', or take another model."
            )
        if model_runner.use_mla_backend:
            absorb_always()
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        pool = self.token_to_kv_pool
        self._window_pool = isinstance(pool, SWAKVPool) and pool.swa_layer_nums > 0
        self._swa_out_cache_loc: torch.Tensor | None = None
        self._plans: list[SlotPlan] = []  # of the whole pool, then of the window pool
        self._fast_decode = decode_is_fast()
        self._padding = PADDING_ALLOWED if self._fast_decode else 1.0
        self._batch: Any = None
        self._reads: DecodeReads | None = None
        self._kept_plans: dict[tuple[bool, ...], SlotPlan] = {}

    # ---- once per forward pass -----------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Find each request's slots once for all layers."""
        mode = forward_batch.forward_mode
        self._plans = [SlotPlan()] * 2
        self._swa_out_cache_loc = None
        self._reads, self._kept_plans = None, {}
        if mode.is_idle():
            return
        if mode.is_draft_extend_v2():
            raise EngineError(
                f"the attention backend {ATTENTION_BACKEND!r} does not serve speculative "
                "decoding with a draft model; start without speculative_algorithm, or with NGRAM."
            )
        if self._window_pool and forward_batch.out_cache_loc is not None:
            self._swa_out_cache_loc = self._to_window_pool(forward_batch.out_cache_loc)
        self._plans = plan_slots(
            forward_batch,
            self.req_to_token_pool.req_to_token,
            [_as_it_is, self._to_window_pool] if self._window_pool else [_as_it_is],
            padding=self._padding,
        )
        if mode.is_decode():
            self._reads = find_reads(forward_batch)
            self._batch = None if self._reads is None else forward_batch

    @property
    def extend_spans(self) -> list[ExtendSpan]:
        """Requests of the extend batch whose metadata was made last, with their slots."""
        return self._plans[0].spans

    def _kept_plan(self, layer_id: int) -> SlotPlan | None:
        """Slots of a layer where some tokens read chosen positions; None where all read everything."""
        if self._reads is None:
            return None
        kept = self._reads.of_layer(layer_id)
        key = tuple(positions is not None for positions in kept)
        if not any(key):
            return None
        if key not in self._kept_plans:
            self._kept_plans[key] = plan_kept_slots(
                self._batch, self.req_to_token_pool.req_to_token, kept, padding=self._padding
            )
        return self._kept_plans[key]

    def _to_window_pool(self, slots: torch.Tensor) -> torch.Tensor:
        flat = self.token_to_kv_pool.translate_loc_from_full_to_swa(slots.reshape(-1))
        result: torch.Tensor = flat.reshape(slots.shape)
        return result

    # ---- once per layer ------------------------------------------------------------------------

    def forward_extend(self, q: torch.Tensor, *call: Any, **more: Any) -> torch.Tensor:
        """Attention of an extend batch; ``q`` is ``[tokens, H * D]``, the result ``[tokens, H * E]``.

        What follows ``q`` are the parameters of :meth:`_write`, in SGLang's order.
        """
        at = self._write(*call, **more)
        q_THD = q.reshape(-1, at.layer.tp_q_head_num, at.layer.qk_head_dim)
        out_THE = q.new_zeros(q_THD.shape[0], at.layer.tp_q_head_num, at.layer.v_head_dim)
        for span in at.plan.spans:
            if span.tree is not None:
                # Refused at start; every model with sinks has a window too.
                assert at.window is None
                assert not at.is_written_out
                out = tree_attention(
                    q_THD[span.start : span.stop],
                    *at.read(span.slots, q.dtype),
                    span.tree,
                    scale=at.layer.scaling,
                )
                out_THE[span.start : span.stop] = out[..., : at.layer.v_head_dim]
                continue
            if at.is_written_out:
                rows = q_THD[span.start : span.stop]
                out_THE[span.start : span.stop] = at.written_out(rows, span.slots, at.window)
                continue
            out = extend_attention(
                q_THD[span.start : span.stop],
                *at.read(span.slots, q.dtype),
                scale=at.layer.scaling,
                window=at.window,
            )
            out_THE[span.start : span.stop] = out[..., : at.layer.v_head_dim]
        return out_THE.flatten(1)

    def forward_decode(self, q: torch.Tensor, *call: Any, **more: Any) -> torch.Tensor:
        """Attention of a decode batch; ``q`` is ``[requests, H * D]``, the result ``[requests, H * E]``."""
        at = self._write(*call, **more)
        window, plan = at.window, at.plan
        if window is None:
            plan = self._kept_plan(at.layer.layer_id) or plan
        q_BHD = q.reshape(-1, at.layer.tp_q_head_num, at.layer.qk_head_dim)
        out_BHE = q.new_zeros(q_BHD.shape[0], at.layer.tp_q_head_num, at.layer.v_head_dim)
        for bucket in plan.buckets:
            if at.is_written_out:
                for row, slots, length in zip(
                    bucket.rows.tolist(), bucket.slots, bucket.lengths, strict=True
                ):
                    out_BHE[row] = at.written_out(q_BHD[row][None], slots[:length], window)[0]
                continue
            longest, shortest = bucket.lengths[0], bucket.lengths[-1]
            # A query at position n - 1 sees keys from n - 1 - window on.
            first = 0 if window is None else max(0, shortest - 1 - window)
            mask_BN = None
            if shortest != longest or (window is not None and longest - 1 - window > first):
                at_N = torch.arange(first, longest)[None, :]
                lengths_B = torch.tensor(bucket.lengths)[:, None]
                hidden = at_N >= lengths_B
                if window is not None:
                    hidden |= at_N < lengths_B - 1 - window
                mask_BN = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(
                    hidden, float("-inf")
                )
            slots = bucket.slots[:, first:]
            query = q_BHD[bucket.rows]
            key, value = at.read(slots, q.dtype)
            scale = at.layer.scaling
            if self._fast_decode:
                out = packed_decode_attention(query, key, value, scale=scale, mask_BN=mask_BN)
            else:
                assert mask_BN is None, "requests of one bucket are of one length"
                out = decode_attention(query, key, value, scale=scale)
            out_BHE[bucket.rows] = out[..., : at.layer.v_head_dim]
        return out_BHE.flatten(1)

    def _write(
        self,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **unserved: Any,
    ) -> _LayerCall:
        """Store the new keys and values, and say what the layer reads."""
        given = [name for name, value in unserved.items() if value is not None]
        if given:
            raise EngineError(
                f"the attention backend {ATTENTION_BACKEND!r} does not serve {', '.join(given)}, "
                "which this model's attention asks for; take another model or backend."
            )
        if save_kv_cache and k is not None and v is not None:
            where = KVWriteLoc(forward_batch.out_cache_loc, self._swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
        window = layer.sliding_window_size
        pool = self.token_to_kv_pool
        in_window_pool = self._window_pool and pool.layers_mapping[layer.layer_id][1]
        return _LayerCall(
            layer=layer,
            keys=pool.get_key_buffer(layer.layer_id),
            values=pool.get_value_buffer(layer.layer_id),
            window=window if window is not None and window > -1 else None,
            plan=self._plans[1 if in_window_pool else 0],
            cap=layer.logit_cap or None,
            sinks=sinks,
        )

    def support_triton(self) -> bool:
        """No: SGLang must not launch Triton kernels for this backend's batches."""
        return False


def _as_it_is(slots: torch.Tensor) -> torch.Tensor:
    return slots
