"""Inside one pass of a forward: have each layer loaded, write the computed rows, attend by position.

:class:`FusedPass` travels in ``ForwardBatch.model_specific_states``, a declared field that survives the copies that
SGLang makes of a batch; the hook on ``RadixAttention.forward`` finds it there. Nothing else of a layer changes, so
every attention backend and model of the supported families works alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from chunk_cache import KVLayout
from rag_kernels import (
    AttentionCall,
    BlockMask,
    LogitRules,
    MeanShiftPlan,
    MethodsOfPass,
    PositionCausalPlan,
    mean_shift_inplace,
    position_causal_attention,
    prepare_attention,
)
from rag_pipeline.sglang_plugin.fusion.forward.loader import Loader
from rag_pipeline.sglang_plugin.fusion.memory.queries import find_tap
from rag_pipeline.sglang_plugin.fusion.runtime.attention_clock import AttentionClock, timed
from rag_pipeline.sglang_plugin.fusion.runtime.layer_rules import rules_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import get_runtime
from rag_pipeline.sglang_plugin.pass_key import PASS_KEY
from rag_pipeline.sglang_plugin.tpla.slices import LatentSlices


class StopPassError(Exception):
    """Ends a probing pass at the layer where nothing further is needed; not an error."""


class Observer(Protocol):
    """Looks at a probing pass; raises :class:`StopPassError` when it has seen enough."""

    @property
    def last_layer(self) -> int:
        """Layer in which it stops the pass."""
        ...

    def before_write(
        self, layer_id: int, k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Look at the loaded pool and the new rows of all requests: rotated part and rest, ``[R, N, H]`` each."""
        ...

    def after_write(self, layer_id: int, q: Tensor, k_pool: Tensor) -> None:
        """Look at the rotated queries ``[R, Hq, E]`` when the new rows are in the pool, whose keys are ``[N, H, E]``."""
        ...


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class FusedPass:
    """One pass of the model over chosen rows.

    Attributes
    ----------
    row_slots : Tensor
        int64 ``[R]``: where each row's new key and value go.
    attention : PositionCausalPlan
        Rows and slots of every request in the pass.
    loader : Loader
        Shared by the passes of a forward.
    scaling : float
        Softmax scale.
    layout : KVLayout
        Of the pool.
    slices : LatentSlices or None
        Of a pool that holds this rank's slice of each latent: records hold as much, and rows attend to whole latents,
        which come together layer by layer.
    shifts : tuple of MeanShiftPlan
        Applied to the cached rows of each layer but the first, those of the layer's own rotation.
    observer : Observer or None
        For probing passes.
    holds_faults : bool
        Finish the pass with zeros after a fault instead of raising it. With tensor parallelism the other
        ranks wait in the collectives of every layer: a rank that left them would make them hang.
    fault : Exception or None
        The first fault of a pass that holds them; its output is worthless then.
    methods : MethodsOfPass or None
        Say which keys the rows read; None for every key up to their own.
    attend : callable, optional
        Replaces the attention function in tests.
    clock : AttentionClock or None
        Measures the attention of each layer.
    """

    row_slots: Tensor
    attention: PositionCausalPlan
    loader: Loader
    scaling: float
    layout: KVLayout
    slices: LatentSlices | None = None
    shifts: tuple[MeanShiftPlan, ...] = ()
    observer: Observer | None = None
    holds_faults: bool = False
    fault: Exception | None = None
    methods: MethodsOfPass | None = None
    attend: Callable[..., Tensor] = position_causal_attention
    clock: AttentionClock | None = None
    _scratch: Tensor | None = None
    """One layer's whole latents, by slot; only the slots of the pass are ever touched."""
    _met: int = -1
    """Last layer whose slices were brought together: the other ranks wait for that in every layer."""

    def prepare(self, runner: Any) -> None:
        """Plan the attention before layer 0, where nothing of the pass waits for it; masks come with their layers."""
        if self.methods is None and self.slices is None:
            k_pool, v_pool = self.layout.attended(runner.token_to_kv_pool, 0)
            prepare_attention(self.attention, k_pool, v_pool, runner.dtype, self.scaling)

    def run_layer(
        self,
        layer: Any,
        pool: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of one layer; the new rows are written here, whoever else SGLang would have write them.

        A model that writes its keys while it rotates them (``save_kv_cache=False``) finds the padding slot in a fused
        batch: what it wrote before the layer is loaded would be gone, and what was there before is still wanted.

        Parameters
        ----------
        layer : RadixAttention
            The layer.
        pool : KVCache
            The paged pool.
        q, k, v : Tensor
            Rotated queries and keys, and values, ``[R, heads * head_dim]`` or ``[R, heads, head_dim]``; of latent
            attention in the absorbed form, with the latents as values.
        sinks : Tensor, optional
            ``[Hq]``: logit per query head of a key without a value that every row reads too.

        Returns
        -------
        Tensor
            ``[R, Hq * v_head_dim]``.
        """
        if not self.holds_faults:
            return self._run_layer(layer, pool, q, k, v, sinks)
        if self.fault is None:
            try:
                return self._run_layer(layer, pool, q, k, v, sinks)
            except StopPassError:
                raise
            except Exception as error:
                self.fault = error
        if self.slices is not None and self._met < int(layer.layer_id):
            self._meet(pool.get_key_buffer(int(layer.layer_id)), int(layer.layer_id))
        if self.observer is not None and int(layer.layer_id) >= self.observer.last_layer:
            raise StopPassError
        return q.new_zeros(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)

    def _run_layer(
        self, layer: Any, pool: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Tensor:
        index = int(layer.layer_id)
        rotated_pool, rest_pool = self.layout.pool_layer(pool, index)
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
        v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
        rotated, rest = self.layout.new_rows(k, v)
        if self.slices is not None:
            rest = self.slices.part(rest)
        self.loader.ensure(index, rotated_pool, rest_pool)
        if self.observer is not None:
            self.observer.before_write(index, rotated_pool, rest_pool, rotated, rest)
        if index > 0:
            turned = self.loader.spec_of(index)
            for shift in self.shifts:
                if shift.spec is turned:
                    mean_shift_inplace(rotated_pool, rest_pool, rotated, rest, shift)
        rotated_pool.index_copy_(0, self.row_slots, rotated.to(rotated_pool.dtype))
        rest_pool.index_copy_(0, self.row_slots, rest.to(rest_pool.dtype))
        if self.slices is None:
            k_pool, v_pool = self.layout.attended(pool, index)
        else:
            k_pool = v_pool = self._meet(pool.get_key_buffer(index), index)
        if self.observer is not None:
            self.observer.after_write(index, q, k_pool)
        rules = rules_of(layer)
        given = {name: value for name, value in rules._asdict().items() if value is not None}
        if sinks is not None:
            given["sinks"] = sinks
        mask = timed(self.clock, "mask", lambda: self._mask(index, q, k_pool, v_pool, rules))
        if self.clock is not None:
            self.clock.count(mask, self.attention)
        if self.methods is not None:
            given["mask"] = mask
        out = timed(
            self.clock,
            "rows",
            lambda: self.attend(q, k_pool, v_pool, self.attention, self.scaling, **given),
        )
        return out[..., : layer.v_head_dim].reshape(out.shape[0], -1)

    def _meet(self, rows: Tensor, index: int) -> Tensor:
        """Bring the ranks' slices of the pass's slots together, ``[N, 1, D + R]`` by slot; on every rank in every layer."""
        assert self.slices is not None
        memo = self.attention.memo
        slots = memo.get("slots of all")
        if slots is None:
            slots = memo["slots of all"] = torch.cat(self.attention.slots)
        self._met = index
        whole = self.slices.whole(rows[slots])
        if self._scratch is None:
            self._scratch = whole.new_empty(rows.shape[0], *whole.shape[1:])
        self._scratch[slots] = whole
        return self._scratch

    def _mask(
        self, index: int, q: Tensor, k_pool: Tensor, v_pool: Tensor, rules: LogitRules
    ) -> BlockMask | None:
        if self.methods is None or rules.sliding_window is not None:
            return None  # within a window every key is read
        call = AttentionCall(
            q_RNH=q,
            k_pool=k_pool,
            v_pool=v_pool,
            plan=self.attention,
            scale=self.scaling,
            logit_cap=rules.logit_cap,
        )
        return self.methods.mask(index, call)


def find_pass(forward_batch: Any) -> FusedPass | None:
    """Return the fused pass that a batch belongs to, or None."""
    states = getattr(forward_batch, "model_specific_states", None)
    found = states.get(PASS_KEY) if states else None
    return found if isinstance(found, FusedPass) else None


def around_radix_attention(
    original: Callable[..., Tensor],
    layer: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_batch: Any,
    save_kv_cache: bool = True,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Wrap ``RadixAttention.forward``: ordinary batches pass through untouched."""
    fused = None
    if forward_batch.model_specific_states is not None:
        fused, tap = find_pass(forward_batch), find_tap(forward_batch)
        if tap is not None:
            tap.take(layer, q)
    if fused is None:
        return timed(
            _clock_of(forward_batch),
            "ordinary",
            lambda: original(layer, q, k, v, forward_batch, save_kv_cache, *args, **kwargs),
        )
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    sinks = kwargs.pop("sinks", None)
    asked = [name for name, value in kwargs.items() if value is not None]
    if k is None or v is None or asked:
        # A fault: the batch is prefilled as usual.
        raise ValueError(
            f"layer {layer.layer_id} asks its attention for {', '.join(asked) or 'no keys of its own'}"
        )
    return fused.run_layer(layer, get_token_to_kv_pool(), q, k, v, sinks=sinks)


def _clock_of(forward_batch: Any) -> AttentionClock | None:
    """Return the clock of an engine that measures attention, for batches of prompts."""
    runtime = get_runtime()
    clock = None if runtime is None else runtime.attention_clock
    return clock if clock is not None and forward_batch.forward_mode.is_extend() else None


def around_can_run_graph(
    original: Callable[..., bool], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> bool:
    """Wrap ``PrefillCudaGraphRunner.can_run_graph``: a batch that is looked into is never replayed from a graph."""
    if find_pass(forward_batch) is not None or find_tap(forward_batch) is not None:
        return False
    return original(runner, forward_batch, *args, **kwargs)
