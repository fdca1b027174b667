"""Run by test_triton.py in a process of its own with TRITON_INTERPRET=1; prints one JSON object.

bf16 arithmetic is wrong in Triton's interpreter, so the cases are fp32 and fp16; bf16 is only copied.
"""

from __future__ import annotations

import json

import torch

from rag_kernels import (
    BlockMask,
    RequestBlocks,
    RotarySpec,
    attention_mass,
    join_mean_shifts,
    mean_shift_inplace,
    plan_attention_mass,
    plan_mean_shift,
    plan_position_causal,
    plan_span_load,
    position_causal_attention,
    query_attention_mass,
    rerotate_keys,
)
from rag_kernels.load_triton import load_spans_triton
from rag_kernels.shift_triton import mean_shift_triton


def readable(blocks, heads, positions, keys):
    """Keys that the blocks leave to each row; bool ``[heads, R, keys]``, one key and row at a time."""
    seen = torch.ones(heads, positions.numel(), keys, dtype=torch.bool)
    if blocks is None:
        return seen
    for row, position in enumerate(positions.tolist()):
        for key in range(keys):
            block, own = key // blocks.key_block, position // blocks.key_block
            if block < own:
                at = position // blocks.query_block - blocks.first_query_block
                allowed = blocks.allowed[:, at, block]
                seen[:, row, key] = allowed.repeat_interleave(heads // allowed.numel())
    return seen


def reference(q, k, v, positions, slots, scale, window=None, cap=None, blocks=None):
    """Plain fp32 attention of one request, mask written out."""
    group = q.shape[1] // k.shape[1]
    kk = k[slots].float().repeat_interleave(group, 1)
    vv = v[slots].float().repeat_interleave(group, 1)
    logits = torch.einsum("rhd,thd->hrt", q.float(), kk) * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    key = torch.arange(slots.numel())[None]
    hidden = key > positions[:, None]
    if window:
        hidden |= key <= positions[:, None] - window
    hidden = hidden | ~readable(blocks, q.shape[1], positions, slots.numel())
    return torch.einsum("hrt,thd->rhd", logits.masked_fill(hidden, float("-inf")).softmax(-1), vv)


def attention_cases() -> dict[str, float]:
    """Largest error of each case."""
    torch.manual_seed(0)
    errors = {}
    cases = [
        ("fp32 scattered", torch.float32, 4, 2, 32, None, None, 32, None),
        ("fp32 head_dim 24 one kv head", torch.float32, 3, 1, 24, None, None, 32, None),
        ("fp16 scattered", torch.float16, 4, 2, 32, None, None, 32, None),
        ("fp32 window", torch.float32, 2, 2, 16, 20, None, 16, None),
        ("fp32 cap", torch.float32, 2, 1, 16, None, 5.0, 64, None),
        ("fp32 mask all heads", torch.float32, 2, 2, 16, None, None, 64, (1, 16, 16)),
        ("fp32 mask key heads", torch.float32, 4, 2, 16, None, None, 64, (2, 64, 32)),
        ("fp32 mask query heads window cap", torch.float32, 6, 2, 16, 70, 5.0, 16, (6, 24, 64)),
        ("fp16 mask query heads", torch.float16, 3, 1, 32, None, None, 32, (3, 64, 32)),
    ]
    for name, dtype, q_heads, kv_heads, dim, window, cap, block_rows, shape in cases:
        positions = [
            torch.randperm(150)[:40],
            torch.tensor([70]),
            torch.empty(0, dtype=torch.int64),
            torch.arange(19),
        ]
        lengths = [150, 99, 5, 19]
        free = torch.randperm(400)
        slots, used = [], 0
        for n in lengths:
            slots.append(free[used : used + n])
            used += n
        k, v = torch.randn(2, 400, kv_heads, dim).to(dtype)
        q = torch.randn(60, q_heads, dim).to(dtype)
        plan = plan_position_causal(
            positions,
            slots,
            num_q_heads=q_heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            kernel="triton",
            block_rows=block_rows,
        )
        masks = [None] * len(lengths)
        if shape is not None:
            heads, query_block, key_block = shape
            for request, n in enumerate(lengths[:3]):  # the last request reads everything
                skipped = int(positions[request].min()) // query_block if request == 1 else 0
                rows = -(-n // query_block) - skipped
                masks[request] = RequestBlocks(
                    allowed=torch.rand(heads, rows, -(-n // key_block)) < 0.4,
                    query_block=query_block,
                    key_block=key_block,
                    first_query_block=skipped,
                )
        mask = BlockMask(requests=tuple(masks)) if shape else None
        got = position_causal_attention(q, k, v, plan, 0.3, window, cap, mask=mask)
        parts, row = [], 0
        for p, s, blocks in zip(positions, slots, masks, strict=True):
            rows = q[row : row + p.numel()]
            parts.append(reference(rows, k, v, p, s, 0.3, window, cap, blocks))
            row += p.numel()
        errors[name] = float((got.float() - torch.cat(parts)).abs().max())
    return errors


def load_cases() -> dict[str, float]:
    """Largest error of each case against the torch path; 0 where bits must agree."""
    torch.manual_seed(1)
    errors = {}
    for name, dtype, neox, dim, rotary, v_dim, deltas in [
        ("load fp32 neox", torch.float32, True, 32, 32, 32, (-700, 1234, 5)),
        ("load fp32 pairs", torch.float32, False, 32, 32, 32, (1234, 1234, -9)),
        ("load fp32 partial", torch.float32, True, 24, 16, 24, (77, 0, -3)),
        ("load fp32 latent", torch.float32, True, 16, 16, 40, (3, 100, 7)),
        ("load fp16 neox", torch.float16, True, 32, 32, 32, (40, -9, 8)),
        ("load bf16 zero", torch.bfloat16, True, 32, 32, 32, (0, 0, 0)),
    ]:
        spec = RotarySpec.from_inv_freq(
            10000.0 ** -(torch.arange(0, rotary, 2) / rotary), rotary, neox
        )
        lengths = (4, 1, 6)
        k_srcs = [torch.randn(n, 3, dim).to(dtype) for n in lengths]
        v_srcs = [torch.randn(n, 3, v_dim).to(dtype) for n in lengths]
        k_srcs[0][0, 0, :4] = -0.0
        k_srcs[1][0, 0, :4] = -0.0
        slots = torch.randperm(20)[:11].split(lengths)
        k_pool, v_pool = torch.zeros(20, 3, dim).to(dtype), torch.zeros(20, 3, v_dim).to(dtype)
        load_spans_triton(k_pool, v_pool, k_srcs, v_srcs, plan_span_load(slots, deltas, spec))
        for places, k, v, delta in zip(slots, k_srcs, v_srcs, deltas, strict=True):
            want = rerotate_keys(k, delta, spec)
            for part, pool, rows in (("", k_pool, want), (" values", v_pool, v)):
                error = float((pool[places].float() - rows.float()).abs().max())
                errors[name + part] = max(errors.get(name + part, 0.0), error)
            if delta == 0:
                bits = torch.int32 if dtype == torch.float32 else torch.int16
                same = torch.equal(k_pool[places].view(bits), k.view(bits))
                errors[name + " bits"] = max(errors.get(name + " bits", 0.0), float(not same))
    return errors


def mass_cases() -> dict[str, float]:
    """Largest error against the plain mass of each request alone."""
    torch.manual_seed(2)
    errors = {}
    for name, dtype, q_heads, kv_heads, dim in [
        ("mass fp32", torch.float32, 6, 2, 16),
        ("mass fp32 one head of 24", torch.float32, 1, 1, 24),
        ("mass fp16", torch.float16, 4, 2, 32),
    ]:
        lengths, counts = (600, 90, 40, 257), (9, 20, 0, 1)
        slots = torch.randperm(1200)[: sum(lengths)].split(lengths)
        k_pool = torch.randn(1200, kv_heads, dim).to(dtype)
        rows, positions, first = [], [], 3  # rows that nobody asked for stand in front, and between
        for length, count in zip(lengths, counts, strict=True):
            rows.append((first, first + count))
            positions.append(torch.randperm(length)[:count])
            first += count + 2
        q = torch.randn(first, q_heads, dim).to(dtype)
        plan = plan_attention_mass(rows, positions, slots, uses_triton=True)
        got = attention_mass(q, k_pool, plan, 0.3).split(plan.lengths)
        for (low, high), at, own, mass in zip(rows, positions, slots, got, strict=True):
            want = query_attention_mass(
                q[low:high].float(), k_pool.float(), own, at, own.numel(), 0.3
            )
            assert abs(float(mass.sum()) - (high > low)) < 1e-4
            errors[name] = max(errors.get(name, 0.0), float((mass - want).abs().max()))
    return errors


def shift_cases() -> dict[str, float]:
    """Largest error against the torch path, over the whole pool."""
    torch.manual_seed(3)
    errors = {}
    for name, dtype, neox, dim, rotary, gives_old in [
        ("shift fp32 neox", torch.float32, True, 32, 32, False),
        ("shift fp32 pairs partial, old rows given", torch.float32, False, 24, 16, True),
        ("shift fp16 neox", torch.float16, True, 16, 16, False),
    ]:
        spec = RotarySpec.from_inv_freq(
            10000.0 ** -(torch.arange(0, rotary, 2) / rotary), rotary, neox
        )
        requests = [([(5, 60), (60, 61), (70, 130)], 140), ([(0, 40), (44, 90)], 100)]
        plans, first, free = [], 2, torch.randperm(300)
        for spans, length in requests:
            rows = torch.randperm(length)[: length // 3].sort().values
            slots, free = free[:length], free[length:]
            plans.append(plan_mean_shift(spans, rows, slots, spec, 0.5, first_row=first))
            first += rows.numel()
        plan = join_mean_shifts(plans)
        pools = torch.randn(2, 300, 3, dim).to(dtype)
        news, olds = (
            torch.randn(2, first, 3, dim).to(dtype),
            torch.randn(2, first, 3, dim).to(dtype),
        )
        old = {"k_old": olds[0], "v_old": olds[1]} if gives_old else {"k_old": None, "v_old": None}
        want = pools.float().clone()
        wide = {key: None if one is None else one.float() for key, one in old.items()}
        mean_shift_inplace(want[0], want[1], news[0].float(), news[1].float(), plan, **wide)
        got = pools.clone()
        mean_shift_triton(got[0], got[1], news[0], news[1], plan, **old)
        assert float((got.float() - pools.float()).abs().max()) > 0.01
        errors[name] = float((got.float() - want).abs().max())
    return errors


if __name__ == "__main__":
    print(json.dumps(attention_cases() | load_cases() | mass_cases() | shift_cases()))
