"""Reference for the self-check: keys and values that a fused request must find in the pool, written out in fp64.

Nothing of ``rag_kernels`` is used here: rotation and mean shift are computed by their definitions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chunk_cache import layout_named, layout_of_pool
from chunk_cache.policies import AttentionSignal, ScoredPolicy
from rag_kernels import RotarySpec
from rag_pipeline.sglang_plugin.fusion.forward.fused_item import plan_item
from rag_pipeline.sglang_plugin.fusion.forward.plan import Piece
from rag_pipeline.sglang_plugin.fusion.request.state import state_of
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import ModelFacts

LayerPairs = list[tuple[Tensor, Tensor]]
"""Keys and values by layer, ``[tokens, heads, head_dim]`` each, on the host."""

_DAMPING, _FEWEST_PROBES = 4, 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedRun:
    """Stored KV for prompt positions ``[start, end)``, to be moved by ``delta`` positions."""

    start: int
    end: int
    delta: int
    stored: LayerPairs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadPlan:
    """What a request is about to load, and where: known before the forward of its last piece.

    Attributes
    ----------
    slots : Tensor
        int64 ``[prompt_len]``: where its KV lies in the pool.
    runs : tuple of LoadedRun
        What is loaded.
    strength : float
        Of the mean shift.
    draft_tokens : int
        Tokens of the draft that the policy asks for.
    """

    slots: Tensor
    runs: tuple[LoadedRun, ...]
    strength: float
    draft_tokens: int


def look_at(req: Any, runner: Any, facts: ModelFacts) -> LoadPlan:
    """Note slots, stored KV and the policy's wishes of a request whose last piece is about to be computed."""
    state, length = state_of(req), len(req.origin_input_ids)
    slots = runner.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :length].to(torch.int64)
    runs, strength, drafted = [], 0.0, 0
    if state is not None and state.spans:
        piece = Piece(start=state.radix_len, end=length, is_last=True)
        layout, _ = plan_item(
            state,
            piece,
            num_layers=facts.num_layers,
            prompt_len=length,
            qkv_share=facts.qkv_share,
        )
        strength = state.policy.shift_strength(layout)
        if isinstance(state.policy, ScoredPolicy):
            signal = state.policy.signal(layout)
            drafted = signal.draft_tokens if isinstance(signal, AttentionSignal) else 0
        for span in state.spans:
            first = span.match.chunk_offset
            record = span.lease.record
            kv_layout, end = layout_named(record.layout), first + span.end - span.start
            pairs = [
                kv_layout.unpack(record.layer(layer, first, end))
                for layer in range(facts.num_layers)
            ]
            stored = [(keys.cpu().clone(), values.cpu().clone()) for keys, values in pairs]
            run = LoadedRun(start=span.start, end=span.end, delta=span.delta, stored=stored)
            runs.append(run)
    return LoadPlan(
        slots=slots.clone(),
        runs=tuple(runs),
        strength=strength,
        draft_tokens=drafted,
    )


def take_from_pool(runner: Any, slots: Tensor, num_layers: int) -> LayerPairs:
    """Copy the KV of free slots to the host and wipe it: the next prompt may get them, and must find nothing right."""
    pool, pairs = runner.token_to_kv_pool, []
    layout = layout_of_pool(pool)
    for layer in range(num_layers):
        buffers = layout.pool_layer(pool, layer)
        pairs.append((buffers[0][slots].cpu(), buffers[1][slots].cpu()))
        for buffer in buffers:
            buffer[slots] = 0
    return pairs


def first_layer_error(one: LayerPairs, two: LayerPairs) -> float:
    """Largest difference in layer 0, relative to the largest entry.

    There keys and values depend on token and position alone: moved KV must be that of plain prefill.
    """
    return max(_relative(a.double(), b.double()) for a, b in zip(one[0], two[0], strict=True))


def moved_error(
    found: LayerPairs,
    plan: LoadPlan,
    recomputed: Sequence[int],
    spec_of: Callable[[int], RotarySpec],
) -> float:
    """Largest difference of loaded KV, over all layers, from stored KV that is turned and shifted as defined.

    Relative to the largest entry of the layer; NaN counts as infinite. Positions in ``recomputed`` are left out.
    """
    worst = 0.0
    for run in plan.runs:
        stays = torch.ones(run.end - run.start, dtype=torch.bool)
        for position in recomputed:
            if run.start <= position < run.end:
                stays[position - run.start] = False
        at = torch.arange(run.end - run.start)
        for layer, (stored_k, stored_v) in enumerate(run.stored):
            spec = spec_of(layer)
            keys, values = (part[run.start : run.end].double() for part in found[layer])
            old_k = turn(stored_k.double(), torch.full_like(at, run.delta), spec)
            old_v = stored_v.double()
            wanted_k, wanted_v = old_k, old_v
            count = int((~stays).sum())
            if layer and plan.strength and count >= _FEWEST_PROBES:
                weight = plan.strength * count / (count + _DAMPING)
                level = turn((keys - old_k)[~stays], -at[~stays], spec).mean(0, keepdim=True)
                wanted_k = old_k + turn(weight * level.expand_as(old_k), at, spec)
                wanted_v = old_v + weight * (values - old_v)[~stays].mean(0, keepdim=True)
            worst = max(
                worst,
                _relative(keys[stays], wanted_k[stays]),
                _relative(values[stays], wanted_v[stays]),
            )
    return worst


def turn(keys: Tensor, by: Tensor, spec: RotarySpec) -> Tensor:
    """Rotate keys ``[T, N, H]`` by so many positions each, int64 ``[T]``."""
    dim = spec.rotary_dim
    angle = by.double()[:, None, None] * spec.inv_freq.cpu().double()
    turned, rest = keys[..., :dim], keys[..., dim:]
    if spec.is_neox_style:
        a, b = turned.chunk(2, -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
    a, b = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    both = torch.cat([a, b], -1) if spec.is_neox_style else torch.stack([a, b], -1).flatten(-2)
    return torch.cat([both, rest], -1)


def _relative(found: Tensor, wanted: Tensor) -> float:
    if not found.numel():
        return 0.0
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    return error if error == error else float("inf")
