"""Prefill of a random-weight Llama by this project's kernels alone: full, reused, with chosen rows, with a sparse method.

Weights are random, so only time is measured. The steps are those of a fused pass: chunk KV is loaded from host memory
and rotated layer by layer, once per layer whatever passes there are, the chosen rows are computed over it, with the
scoring pass also the mean shift of the others, and the last row gives the logits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from rag_eval.gpu_check.timing import time_calls
from rag_kernels import (
    ATTENTION_METHODS,
    AttentionCall,
    MassPlan,
    MeanShiftPlan,
    MethodsOfPass,
    PositionCausalPlan,
    RotarySpec,
    attention_mass,
    create_attention_method,
    join_mean_shifts,
    load_spans_inplace,
    mean_shift_inplace,
    plan_attention_mass,
    plan_mean_shift,
    plan_position_causal,
    plan_span_load,
    position_causal_attention,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaShape:
    """Sizes of Llama-3.1-8B."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 14_336
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    vocabulary: int = 128_256


TINY = LlamaShape(layers=3, hidden=64, inner=128, q_heads=4, kv_heads=2, dim=16, vocabulary=256)
QUESTION = 72
CHUNK = 512


class RandomLlama:
    """A Llama with random weights, and a paged pool.

    Parameters
    ----------
    shape : LlamaShape
        Sizes.
    slots : int
        Slots of the pool.
    device : torch.device
        Where it is.
    """

    def __init__(self, shape: LlamaShape, slots: int, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q_width, kv_width = shape.q_heads * shape.dim, shape.kv_heads * shape.dim

        def weight(rows: int, columns: int) -> Tensor:
            return torch.empty(rows, columns, device=device, dtype=self.dtype).normal_(
                std=columns**-0.5
            )

        self.embedding = weight(shape.vocabulary, shape.hidden)
        self.head = weight(shape.vocabulary, shape.hidden)
        self.layers = [
            (
                weight(q_width + 2 * kv_width, shape.hidden),
                weight(shape.hidden, q_width),
                weight(2 * shape.inner, shape.hidden),
                weight(shape.hidden, shape.inner),
            )
            for _ in range(shape.layers)
        ]
        self.k_pools, self.v_pools = (
            [
                torch.zeros(slots, shape.kv_heads, shape.dim, device=device, dtype=self.dtype)
                for _ in range(shape.layers)
            ]
            for _ in range(2)
        )
        exponent = torch.arange(0, shape.dim, 2) / shape.dim
        self.spec = RotarySpec.from_inv_freq(500_000.0**-exponent, shape.dim, True)
        self.scale = shape.dim**-0.5

    def forward(
        self,
        plan: PositionCausalPlan,
        row_slots: Tensor,
        *,
        load: Load | None = None,
        loaded_layers: int = 0,
        shift: MeanShiftPlan | None = None,
        methods: MethodsOfPass | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Compute the rows of a plan; returns the logits of the last row of each request, fp32.

        The first ``loaded_layers`` are there already. With ``watch`` the pass ends behind its last layer, and its sum is
        returned.
        """
        shape, positions = self.shape, plan.positions.to(self.device)
        cos, sin = self.spec.cos_sin(positions.long(), self.device)
        rotation = (cos[:, None].to(self.dtype), sin[:, None].to(self.dtype))
        hidden = self.embedding[positions.long() * 7919 % shape.vocabulary]
        for index, (qkv, out, gate_up, down) in enumerate(self.layers):
            k_pool, v_pool = self.k_pools[index], self.v_pools[index]
            q, k, v = (
                linear(rms_norm(hidden, hidden.shape[-1:]), qkv)
                .view(plan.num_rows, -1, shape.dim)
                .split([shape.q_heads, shape.kv_heads, shape.kv_heads], dim=1)
            )
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
            if load is not None and index >= loaded_layers:
                load.layer(index, k_pool, v_pool)
            if shift is not None and index > 0:
                mean_shift_inplace(k_pool, v_pool, k, v, shift)
            k_pool.index_copy_(0, row_slots, k)
            v_pool.index_copy_(0, row_slots, v)
            if watch is not None and watch.look(index, q, k_pool, plan, self.scale):
                return watch.mass
            mask = None
            if methods is not None:
                call = AttentionCall(
                    q_RNH=q, k_pool=k_pool, v_pool=v_pool, plan=plan, scale=self.scale
                )
                mask = methods.mask(index, call)
            seen = position_causal_attention(q, k_pool, v_pool, plan, self.scale, mask=mask)
            hidden = hidden + linear(seen.flatten(1), out)
            gate, up = linear(rms_norm(hidden, hidden.shape[-1:]), gate_up).chunk(2, dim=-1)
            hidden = hidden + linear(silu(gate) * up, down)
        last = torch.tensor(plan.row_starts[1:], device=self.device) - 1
        return linear(rms_norm(hidden[last], hidden.shape[-1:]), self.head).float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Load:
    """Chunk KV of all layers in host memory, page-locked where there is a GPU, written layer by layer."""

    def __init__(self, llama: RandomLlama, slots: Sequence[Tensor], deltas: Sequence[int]) -> None:
        shape, lengths = llama.shape, [part.numel() for part in slots]
        kind = {"dtype": llama.dtype, "pin_memory": llama.device.type == "cuda"}
        self._kv = torch.zeros(2, sum(lengths), shape.kv_heads, shape.dim, **kind)
        self._lengths = lengths
        self._device = llama.device
        self._plan = plan_span_load(slots, deltas, llama.spec)
        self.num_bytes = self._kv.nbytes * shape.layers

    def layer(self, index: int, k_pool: Tensor, v_pool: Tensor) -> None:
        """Write one layer; the same host memory serves all."""
        moved = self._kv.to(self._device, non_blocking=True)
        load_spans_inplace(
            k_pool,
            v_pool,
            moved[0].split(self._lengths),
            moved[1].split(self._lengths),
            self._plan,
        )


class Watch:
    """Adds up the attention mass of the question, from the half of the layers to four fifths."""

    def __init__(self, llama: RandomLlama, slots: Sequence[Tensor]) -> None:
        self._first, self._last = llama.shape.layers // 2, max(1, int(0.8 * llama.shape.layers))
        self.num_layers = self._last
        """Layers that the pass goes through."""
        self._slots = slots
        self._mass_plan: MassPlan | None = None
        self.mass = torch.zeros(1)
        """Of all requests, one behind the other."""

    def look(
        self, index: int, q: Tensor, k_pool: Tensor, plan: PositionCausalPlan, scale: float
    ) -> bool:
        """Look at one layer; true behind the last one."""
        if self._first <= index < self._last:
            if self._mass_plan is None:
                rows = list(itertools.pairwise(plan.row_starts))
                at = [plan.positions[low:high] for low, high in rows]
                self._mass_plan = plan_attention_mass(rows, at, self._slots)
            found = attention_mass(q, k_pool, self._mass_plan, scale)
            self.mass = found if index == self._first else self.mass + found
        return index + 1 >= self._last


def time_prefill(
    shape: LlamaShape, lengths: Sequence[int], device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """Time the ways to a first token, one request and eight; ``vs_full`` is against full prefill of the same prompts."""
    for length, requests in [(length, 1) for length in lengths] + [(lengths[0], 8)]:
        llama = RandomLlama(shape, length * requests, device)
        prompts = _Prompts(llama, length, requests)
        full: float | None = None
        for name, call in prompts.ways().items():
            told: dict[str, Any] = {"tokens": length, "requests": requests, "what": name}
            try:
                taken = time_calls(call, device, repeats)
            except Exception as error:
                yield told | {"failed": repr(error)[:300]}
                continue
            full = taken["ms"] if full is None else full
            yield told | {"vs_full": taken["ms"] / full} | taken
        yield {
            "tokens": length,
            "requests": requests,
            "what": "load alone, GB/s",
            "gb_per_s": prompts.load_rate(repeats),
        }
        del llama, prompts
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _Prompts:
    def __init__(self, llama: RandomLlama, length: int, requests: int) -> None:
        self.llama, self.length, self.requests = llama, length, requests
        order = torch.randperm(length * requests, generator=torch.Generator().manual_seed(1))
        self.slots = list(order.to(llama.device).split(length))
        self.question = min(QUESTION, length // 4)

    def ways(self) -> dict[str, Any]:
        """Name to a call that ends with the first token's logits."""
        every = torch.arange(self.length)
        reused = self.length - self.question
        generator = torch.Generator().manual_seed(2)
        chosen = torch.randperm(reused, generator=generator)[: round(0.15 * reused)]
        asked = torch.arange(reused, self.length)
        made = {
            "full": lambda: self._pass(every),
            "reuse": lambda: self._pass(asked, load=True),
            "rows 15%": lambda: self._pass(torch.cat([chosen.sort().values, asked]), load=True),
            "query 15%, scoring included": lambda: self._query(asked, reused),
        }
        for method in ATTENTION_METHODS.names():
            if method != "dense":
                made[f"attention {method}"] = functools.partial(self._pass, every, method=method)
        return made

    def load_rate(self, repeats: int) -> float:
        """Gigabytes of chunk KV per second, from host memory into the pool."""
        load, llama = self._load(), self.llama

        def all_layers() -> None:
            for index in range(llama.shape.layers):
                load.layer(index, llama.k_pools[index], llama.v_pools[index])

        taken: float = time_calls(all_layers, llama.device, repeats)["ms"]
        rate: float = load.num_bytes / taken / 1e6
        return rate

    def _load(self) -> Load:
        reused = self.length - self.question
        parts = [part for slots in self.slots for part in slots[:reused].split(CHUNK)]
        return Load(self.llama, parts, [64 * (index % 9 - 4) for index in range(len(parts))])

    def _plan(self, rows: Tensor) -> tuple[PositionCausalPlan, Tensor]:
        shape = self.llama.shape
        plan = plan_position_causal(
            [rows] * self.requests,
            self.slots,
            num_q_heads=shape.q_heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.dim,
            device=self.llama.device,
        )
        at = rows.to(self.llama.device)
        return plan, torch.cat([slots[at] for slots in self.slots])

    def _pass(self, rows: Tensor, *, load: bool = False, method: str = "") -> Tensor:
        plan, row_slots = self._plan(rows)
        methods = None
        if method:
            one = create_attention_method(method)
            methods = MethodsOfPass(plan, [one] * self.requests)
        loads = self._load_once() if load else None
        return self.llama.forward(plan, row_slots, load=loads, methods=methods)

    def _load_once(self) -> Load:
        # The host memory that the chunks lie in is there before the request comes.
        if not hasattr(self, "_kept"):
            self._kept = self._load()
        return self._kept

    def _query(self, asked: Tensor, reused: int) -> Tensor:
        plan, row_slots = self._plan(asked)
        watch = Watch(self.llama, self.slots)
        mass = self.llama.forward(plan, row_slots, load=self._load_once(), watch=watch)
        each = mass.view(self.requests, -1)[
            0, :reused
        ]  # the same rows of all: they are planned together
        rows = each.topk(round(0.15 * reused)).indices.sort().values.cpu()
        both = torch.cat([rows, asked])
        plan, row_slots = self._plan(both)
        chunks = [(low, min(low + CHUNK, reused)) for low in range(0, reused, CHUNK)]
        (shift,) = join_mean_shifts(
            [
                plan_mean_shift(
                    chunks, both, slots, self.llama.spec, first_row=index * both.numel()
                )
                for index, slots in enumerate(self.slots)
            ]
        )
        return self.llama.forward(
            plan,
            row_slots,
            load=self._load_once(),
            loaded_layers=watch.num_layers,
            shift=shift,
        )
