"""A three-layer attention model: in fp64 over a whole prompt (the truth), in fp32 over the rows of a batch."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rag_kernels import RotarySpec
from rag_pipeline.sglang_plugin.fusion.forward.layer_pass import find_pass

VOCAB, LAYERS, WIDTH, DIM, Q_HEADS, KV_HEADS = 48, 3, 16, 8, 2, 1
SPEC = RotarySpec.from_inv_freq(100.0 ** (-torch.arange(0, DIM, 2).double() / DIM))


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate ``[T, heads, DIM]`` to positions ``[T]``, halves paired."""
    angle = positions.double()[:, None, None] * SPEC.inv_freq
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@functools.cache
def weights(epoch: int) -> dict[str, Tensor]:
    """Random weights in fp64; others for every epoch."""
    generator = torch.Generator().manual_seed(1000 + epoch)

    def make(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return drawn * scale / rows**0.5

    made = {"embed": make(VOCAB, WIDTH, VOCAB**0.5), "head": make(WIDTH, VOCAB)}
    for layer in range(LAYERS):
        made[f"q{layer}"] = make(WIDTH, Q_HEADS * DIM, 2.0)
        made[f"k{layer}"] = make(WIDTH, KV_HEADS * DIM, 2.0)
        made[f"v{layer}"] = make(WIDTH, KV_HEADS * DIM)
        made[f"o{layer}"] = make(Q_HEADS * DIM, WIDTH)
    return made


@functools.cache
def single(epoch: int) -> dict[str, Tensor]:
    """The same weights in fp32."""
    return {name: tensor.float() for name, tensor in weights(epoch).items()}


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@functools.lru_cache(maxsize=512)
def truth(epoch: int, ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Keys and values of plain prefill, fp64 ``[LAYERS, T, KV_HEADS, DIM]``."""
    w, positions = weights(epoch), torch.arange(len(ids))
    h, keys, values = w["embed"][torch.tensor(ids)], [], []
    hidden = positions[None] > positions[:, None]
    for layer in range(LAYERS):
        x = _norm(h)
        q = rotate((x @ w[f"q{layer}"]).view(-1, Q_HEADS, DIM), positions)
        k = rotate((x @ w[f"k{layer}"]).view(-1, KV_HEADS, DIM), positions)
        v = (x @ w[f"v{layer}"]).view(-1, KV_HEADS, DIM)
        keys.append(k)
        values.append(v)
        group = Q_HEADS // KV_HEADS
        logits = torch.einsum("rhd,khd->hrk", q, k.repeat_interleave(group, 1)) / DIM**0.5
        share = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        h = (
            h
            + torch.einsum("hrk,khd->rhd", share, v.repeat_interleave(group, 1)).flatten(1)
            @ (w[f"o{layer}"])
        )
    return torch.stack(keys), torch.stack(values)


def layer_modules() -> tuple[Any, ...]:
    """What fusion reads of a ``RadixAttention`` module."""
    return tuple(
        SimpleNamespace(
            layer_id=layer,
            tp_q_head_num=Q_HEADS,
            tp_k_head_num=KV_HEADS,
            tp_v_head_num=KV_HEADS,
            qk_head_dim=DIM,
            v_head_dim=DIM,
        )
        for layer in range(LAYERS)
    )


class Pool:
    """Paged pool in fp32, slot 0 out of circulation."""

    def __init__(self, slots: int) -> None:
        self.keys = torch.zeros(LAYERS, slots, KV_HEADS, DIM)
        self.values = torch.zeros(LAYERS, slots, KV_HEADS, DIM)

    def get_key_buffer(self, layer: int) -> Tensor:
        """``[slots, KV_HEADS, DIM]``."""
        return self.keys[layer]

    def get_value_buffer(self, layer: int) -> Tensor:
        """``[slots, KV_HEADS, DIM]``."""
        return self.values[layer]


_MODULES = layer_modules()


def compute(
    epoch: int, pool: Pool, req_to_token: Tensor, batch: Any, *, fails_at: int | None = None
) -> Any:
    """Forward of a batch in fp32: fused rows by their pass, others causally over their request's slots.

    ``fails_at`` is a layer in which the fused pass meets a fault.
    """
    w, fused = single(epoch), find_pass(batch)
    h, positions = w["embed"][batch.input_ids], batch.positions
    for layer in range(LAYERS):
        x = _norm(h)
        q = rotate((x @ w[f"q{layer}"]).view(-1, Q_HEADS, DIM), positions)
        k = rotate((x @ w[f"k{layer}"]).view(-1, KV_HEADS, DIM), positions)
        v = (x @ w[f"v{layer}"]).view(-1, KV_HEADS, DIM)
        if fused is not None:
            if layer == fails_at:
                fused.attend = _fault
            out = fused.run_layer(_MODULES[layer], pool, q, k, v)
        else:
            pool.keys[layer][batch.out_cache_loc] = k
            pool.values[layer][batch.out_cache_loc] = v
            out = _ordinary(layer, pool, req_to_token, batch, q, positions)
        h = h + out @ w[f"o{layer}"]
    last = torch.tensor(batch.extend_seq_lens_cpu).cumsum(0) - 1
    logits = _norm(h)[last] @ w["head"]
    return SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=logits))


def _fault(*args: Any) -> Tensor:
    raise RuntimeError("injected")


def _ordinary(
    layer: int, pool: Pool, req_to_token: Tensor, batch: Any, q: Tensor, positions: Tensor
) -> Tensor:
    parts, first = [], 0
    for index, count in enumerate(batch.extend_seq_lens_cpu):
        rows = slice(first, first + count)
        first += count
        length = int(positions[rows][-1]) + 1
        slots = req_to_token[int(batch.req_pool_indices[index]), :length].long()
        group = Q_HEADS // KV_HEADS
        keys = pool.keys[layer][slots].repeat_interleave(group, 1)
        values = pool.values[layer][slots].repeat_interleave(group, 1)
        logits = torch.einsum("rhd,khd->hrk", q[rows], keys) / DIM**0.5
        hidden = torch.arange(length)[None] > positions[rows][:, None]
        share = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hrk,khd->rhd", share, values).flatten(1))
    return torch.cat(parts)
