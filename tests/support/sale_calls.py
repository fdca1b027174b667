"""Prompts for SALE with single far keys that rows look for, what a method keeps of them, and the weights by definition."""

from __future__ import annotations

import math

import torch

from rag_kernels import (
    AttentionCall,
    create_attention_method,
    plan_position_causal,
    position_causal_attention,
)

SMALL = "block_q=16+block_k=8+local_window=32+segment=32+min_tokens=64"
Q_HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 32, 460


def lookups(tokens=TOKENS):
    """Which row of which head looks for which key."""
    keys = range(33, tokens - 120, 17)
    return [(key, key + far, key % Q_HEADS) for key in keys for far in (90, 119)]


def planted(tokens=TOKENS, dtype=torch.float32):
    """Queries, keys, values: a mean, neighbours that matter, and single far keys that a row here and there looks for."""
    rest = torch.randn(tokens, KV_HEADS, DIM)
    k = rest + 2 * torch.randn(KV_HEADS, DIM)
    q = 0.3 * torch.randn(tokens, Q_HEADS, DIM) + 0.1 * torch.randn(Q_HEADS, DIM)
    near = torch.zeros(tokens, DIM)
    for token in range(1, tokens):  # alike over some thirty tokens
        near[token] = 0.97 * near[token - 1] + 0.24 * torch.randn(DIM)
    k += near[:, None]
    q += near[:, None]
    for key, row, head in lookups(tokens):
        q[row, head] += 1.5 * rest[key, head // (Q_HEADS // KV_HEADS)]
    return q.to(dtype), k.to(dtype), torch.randn(tokens, KV_HEADS, DIM).to(dtype)


def call_of(q, k, v, positions=None, slots=None, scale=DIM**-0.5, **more):
    positions = torch.arange(len(q)) if positions is None else positions
    plan = plan_position_causal(
        [positions],
        [torch.arange(len(k)) if slots is None else slots],
        num_q_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
    )
    return AttentionCall(q_RNH=q, k_pool=k, v_pool=v, plan=plan, scale=scale, **more)


def choose(method, call, layer=0):
    made = create_attention_method(method)
    mask = made.mask(layer, call, made.prepare(call.plan, (0,)))
    if mask is None or mask.requests[0] is None:
        return None
    mask.check(call.plan)
    return mask


def attend(call, mask=None):
    return position_causal_attention(
        call.q_RNH, call.k_pool, call.v_pool, call.plan, call.scale, mask=mask
    )


def keys_read(mask, tokens):
    """bool ``[Hq, rows, keys]`` by the rule of masks."""
    rows = torch.arange(tokens)
    blocks = mask.requests[0]
    read = blocks.rows(rows).repeat_interleave(blocks.key_block, dim=2)[..., :tokens]
    return read & (rows[None, :] <= rows[:, None])


def always_read(tokens, block_q=16, block_k=8, local=32, segment=32, min_tokens=64):
    """Sink, neighbourhood and early rows by their definition, bool ``[rows, keys]``."""
    read = torch.zeros(tokens, tokens, dtype=torch.bool)
    for row in range(tokens):
        start = row // block_q * block_q
        end = max(0, start - local) // segment * segment
        read[row, :block_k] = read[row, end:] = True
        if start < min_tokens:
            read[row] = True
    return read.tril()


def weights_of(call):
    """Softmax weights of every row, fp32 ``[Hq, rows, keys]``."""
    q, k = call.q_RNH.float(), call.k_pool.float()
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) * call.scale
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -math.inf).softmax(-1)
