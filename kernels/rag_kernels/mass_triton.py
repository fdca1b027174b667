"""Attention mass of many requests in two launches: softmax statistics by runs of keys, then the mass of each key.

The first launch leaves the largest logit and the sum of exponentials of every row over each run of keys; the second one
puts those of a row together and adds up the row's weights by key. A run of keys is read once per key/value head and
launch, for all rows of its request. Checked in Triton's interpreter (fp32, fp16) and compiled for sm_90a; not run on a
GPU here, so its speed is unmeasured.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rag_kernels.host_copy import to_device
from rag_kernels.softmax_triton import dot_keys, raised

_KEYS = 64
_ROWS = 64
_SHORTEST_RUN = 256
_MOST_RUNS = 64
"""Runs of a request, so that putting a row's statistics together stays short."""


@triton.jit
def _load_run(run_ptr, num_runs):
    """First row, rows, first slot of the request, first key and end of the keys: the front of a column of the table."""
    return (
        tl.load(run_ptr),
        tl.load(run_ptr + num_runs),
        tl.load(run_ptr + 2 * num_runs),
        tl.load(run_ptr + 3 * num_runs),
        tl.load(run_ptr + 4 * num_runs),
    )


@triton.jit
def _load_rows(
    q_ptr, positions_ptr, start, kv_head, row_lo, num_rows, q_row, q_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Queries of ``ROWS`` packed rows from ``start`` on, and their positions; -1 behind the end."""
    dims = tl.arange(0, DIM_PAD)
    packed = start + tl.arange(0, ROWS)
    rows = row_lo + packed // GROUP
    is_row = packed < num_rows * GROUP
    heads = kv_head * GROUP + packed % GROUP
    q = tl.load(
        q_ptr + (rows.to(tl.int64) * q_row + heads * q_head)[:, None] + dims[None, :],
        mask=is_row[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    return q, tl.load(positions_ptr + rows, mask=is_row, other=-1)


@triton.jit
def _logits(
    q, position, k_base, slot_base, first, key_hi, scale, k_slot,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 of the rows for keys from ``first`` on; minus infinity where a row does not see the key."""
    keys = first + tl.arange(0, KEYS)
    is_key = keys < key_hi
    logits, _ = dot_keys(q, k_base, slot_base, keys, is_key, k_slot, DIM, DIM_PAD)
    logits *= scale * 1.4426950408889634
    seen = is_key[None, :] & (keys[None, :] <= position[:, None])
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def mass_statistics_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    slots_ptr,
    runs_ptr,
    best_ptr,
    total_ptr,
    scale,
    num_runs,
    width,
    q_row,
    q_head,
    k_slot,
    k_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Statistics of all rows of a request over one run of keys.

    ``runs_ptr`` is int32 ``[7, num_runs]``: first row, rows, first slot of the request, first key, end of the keys, the
    request's first run and their number. Statistics are fp32 ``[runs, kv heads, width]``.
    """
    run = tl.program_id(0)
    kv_head = tl.program_id(1)
    row_lo, num_rows, slot_at, key_lo, key_hi = _load_run(runs_ptr + run, num_runs)
    base = (run.to(tl.int64) * tl.num_programs(1) + kv_head) * width
    k_base = k_ptr + kv_head.to(tl.int64) * k_head
    for start in range(0, num_rows * GROUP, ROWS):
        q, position = _load_rows(
            q_ptr, positions_ptr, start, kv_head, row_lo, num_rows, q_row, q_head,
            GROUP, DIM, DIM_PAD, ROWS,
        )  # fmt: skip
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for first in range(key_lo, key_hi, KEYS):
            logits = _logits(
                q, position, k_base, slots_ptr + slot_at, first, key_hi, scale, k_slot,
                DIM, DIM_PAD, KEYS,
            )  # fmt: skip
            best, level, fade = raised(best, tl.max(logits, 1))
            total = total * fade + tl.sum(tl.exp2(logits - level[:, None]), 1)
        at = start + tl.arange(0, ROWS)
        tl.store(best_ptr + base + at, best, mask=at < num_rows * GROUP)
        tl.store(total_ptr + base + at, total, mask=at < num_rows * GROUP)


@triton.jit
def mass_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    slots_ptr,
    runs_ptr,
    best_ptr,
    total_ptr,
    mass_ptr,
    scale,
    num_runs,
    width,
    mass_head,
    q_row,
    q_head,
    k_slot,
    k_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Add the mass of the keys of one run, of one key/value head's queries.

    ``mass_ptr`` is fp32 ``[kv heads, keys]``, zeros before: no other program touches these entries.
    """
    run = tl.program_id(0)
    kv_head = tl.program_id(1)
    row_lo, num_rows, slot_at, key_lo, key_hi = _load_run(runs_ptr + run, num_runs)
    run_lo = tl.load(runs_ptr + 5 * num_runs + run)
    run_count = tl.load(runs_ptr + 6 * num_runs + run)
    heads = tl.num_programs(1)
    k_base = k_ptr + kv_head.to(tl.int64) * k_head
    out = mass_ptr + kv_head.to(tl.int64) * mass_head + slot_at
    share = 1.0 / (num_rows * heads * GROUP)
    for start in range(0, num_rows * GROUP, ROWS):
        q, position = _load_rows(
            q_ptr, positions_ptr, start, kv_head, row_lo, num_rows, q_row, q_head,
            GROUP, DIM, DIM_PAD, ROWS,
        )  # fmt: skip
        packed = start + tl.arange(0, ROWS)
        is_row = packed < num_rows * GROUP
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for other in range(run_lo, run_lo + run_count):
            at = (other * heads + kv_head.to(tl.int64)) * width + packed
            its_best = tl.load(best_ptr + at, mask=is_row, other=float("-inf"))
            its_total = tl.load(total_ptr + at, mask=is_row, other=0.0)
            best, level, fade = raised(best, its_best)
            total = total * fade + its_total * tl.exp2(its_best - level)
        level = tl.where(best == float("-inf"), 0.0, best)
        factor = share / tl.where(total == 0.0, 1.0, total)
        for first in range(key_lo, key_hi, KEYS):
            logits = _logits(
                q, position, k_base, slots_ptr + slot_at, first, key_hi, scale, k_slot,
                DIM, DIM_PAD, KEYS,
            )  # fmt: skip
            mass = tl.sum(tl.exp2(logits - level[:, None]) * factor[:, None], 0)
            keys = first + tl.arange(0, KEYS)
            before = tl.load(out + keys, mask=keys < key_hi, other=0.0)
            tl.store(out + keys, before + mass, mask=keys < key_hi)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MassRuns:
    """The keys of all requests cut into runs; made once per pass.

    Attributes
    ----------
    table : Tensor
        int32 ``[7, runs]`` on the device, see :func:`mass_statistics_kernel`.
    most_rows : int
        Rows of the request that has the most.
    """

    table: Tensor
    most_rows: int


def cut_runs(
    rows: tuple[tuple[int, int], ...], lengths: tuple[int, ...], device: torch.device
) -> MassRuns:
    """Cut the keys of requests, which lie one behind the other, into runs.

    Parameters
    ----------
    rows : tuple of (int, int)
        Rows of each request in the queries.
    lengths : tuple of int
        Keys of each request.
    device : torch.device
        Where the table goes.
    """
    table: list[tuple[int, ...]] = []
    first_slot = 0
    for (low, high), keys in zip(rows, lengths, strict=True):
        size = max(_SHORTEST_RUN, -(-keys // _MOST_RUNS // _KEYS) * _KEYS)
        starts = range(0, keys, size) if high > low else ()
        first = len(table)
        table += [
            (low, high - low, first_slot, at, min(at + size, keys), first, len(starts))
            for at in starts
        ]
        first_slot += keys
    made = torch.tensor(table, dtype=torch.int32).reshape(-1, 7).t().contiguous()
    return MassRuns(
        table=to_device(made, device), most_rows=max((high - low for low, high in rows), default=0)
    )


def mass_triton(
    q_RNH: Tensor,
    k_pool: Tensor,
    positions: Tensor,
    slots: Tensor,
    runs: MassRuns,
    scale: float,
) -> Tensor:
    """Mass on every key of every request, fp32 ``[sum of keys]``; 0 for requests without rows.

    Parameters
    ----------
    q_RNH : Tensor
        ``[R, Hq, D]``, innermost stride 1.
    k_pool : Tensor
        ``[num_slots, Hk, D]``, innermost stride 1.
    positions : Tensor
        int32 ``[R]`` on the device, of all rows of the queries; of those of no request it has no meaning.
    slots : Tensor
        int64, the slots of all requests one behind the other.
    runs : MassRuns
        From :func:`cut_runs`.
    scale : float
        Softmax scale.
    """
    kv_heads, dim = k_pool.shape[1:]
    group = q_RNH.shape[1] // kv_heads
    width = runs.most_rows * group
    count = int(runs.table.shape[1])
    mass = torch.zeros(kv_heads, slots.numel(), dtype=torch.float32, device=q_RNH.device)
    if not count:
        return mass.sum(0)
    best, total = torch.empty(
        2, count, kv_heads, width, dtype=torch.float32, device=q_RNH.device
    ).unbind()
    shape: dict[str, Any] = {
        "GROUP": group,
        "DIM": dim,
        "DIM_PAD": max(16, triton.next_power_of_2(dim)),
        "ROWS": _ROWS,
        "KEYS": _KEYS,
        "num_warps": 4,
        "num_stages": 2,
    }
    inputs = (q_RNH, k_pool, positions, slots, runs.table, best, total)
    strides = (q_RNH.stride(0), q_RNH.stride(1), k_pool.stride(0), k_pool.stride(1))
    grid = (count, kv_heads)
    mass_statistics_kernel[grid](*inputs, scale, count, width, *strides, **shape)
    mass_kernel[grid](*inputs, mass, scale, count, width, mass.stride(0), *strides, **shape)
    return mass.sum(0)
