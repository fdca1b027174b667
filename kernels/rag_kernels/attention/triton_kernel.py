"""The Triton program of position-causal attention: an online softmax over the keys of a tile of packed query rows.

A *tile* holds rows of one request for one key/value head, all query heads of its group packed: tile row ``m`` is query
row ``m // GROUP``, head ``m % GROUP`` of the group, so that K and V are read once per group. The keys ``0 .. open - 1``,
which every row sees, need no mask; behind them, and where a window or a block mask is in force, rows are masked by
absolute position. With a block mask only the listed key blocks are read: those that any row of the tile may read.

The softmax is in base 2: one multiplication per logit is saved.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from rag_kernels.softmax_triton import dot_keys, raised


@triton.jit
def _attend_keys(
    q,
    position,
    flags,
    best,
    total,
    acc,
    start,
    kv_len,
    k_base,
    v_base,
    slot_base,
    scale,
    logit_cap,
    window,
    k_slot,
    v_slot,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_OPEN: tl.constexpr,
):
    """One step: keys ``start .. start + KEYS - 1``. ``IS_OPEN``: every row sees all of them."""
    log2e: tl.constexpr = 1.4426950408889634
    dims = tl.arange(0, DIM_PAD)
    is_dim = dims < DIM
    keys = start + tl.arange(0, KEYS)
    is_key = keys < kv_len
    logits, slot = dot_keys(q, k_base, slot_base, keys, is_key, k_slot, DIM, DIM_PAD)
    logits *= scale
    if HAS_CAP:
        # tanh through exp: 1 - 2 / (exp(2x) + 1) is right at both ends.
        logits = logit_cap * (1.0 - 2.0 / (tl.exp(2.0 * logits / logit_cap) + 1.0))
    logits = logits * log2e
    if not IS_OPEN:
        seen = is_key[None, :] & (keys[None, :] <= position[:, None]) & flags[:, None]
        if HAS_WINDOW:
            seen = seen & (keys[None, :] > position[:, None] - window)
        logits = tl.where(seen, logits, float("-inf"))
    new_best, level, fade = raised(best, tl.max(logits, 1))
    weights = tl.exp2(logits - level[:, None])
    total = total * fade + tl.sum(weights, 1)
    v = tl.load(
        v_base + slot[:, None] * v_slot + dims[None, :],
        mask=is_key[:, None] & is_dim[None, :],
        other=0.0,
    )
    acc = acc * fade[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
    return new_best, total, acc


@triton.jit
def position_causal_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    positions_ptr,
    slots_ptr,
    tiles_ptr,
    allowed_ptr,
    block_count_ptr,
    block_index_ptr,
    scale,
    logit_cap,
    window,
    num_tiles,
    q_row,
    q_head,
    k_slot,
    k_head,
    v_slot,
    v_head,
    out_row,
    out_head,
    mask_kv_head,
    mask_group,
    mask_row,
    max_blocks,
    first_query_block,
    query_block,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """One tile of one key/value head.

    Strides are in elements, the innermost stride is 1. ``tiles_ptr`` is int64 ``[3, num_tiles]``: first row, end of the
    rows, first slot of the request. ``KEY_BLOCK`` is 0 where there is no block mask; then the mask's pointers and
    strides are not used. ``block_count_ptr`` is int32 ``[Hk, num_tiles]``, ``block_index_ptr`` int32
    ``[Hk, num_tiles, max_blocks]``, ``allowed_ptr`` uint8 ``[heads, query blocks, key blocks]``.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    row_lo = tl.load(tiles_ptr + tile)
    row_hi = tl.load(tiles_ptr + num_tiles + tile)
    slot_base = slots_ptr + tl.load(tiles_ptr + 2 * num_tiles + tile)

    packed = tl.arange(0, ROWS)
    rows = row_lo + packed // GROUP
    group = packed % GROUP
    is_row = rows < row_hi
    dims = tl.arange(0, DIM_PAD)
    is_dim = dims < DIM
    position = tl.load(positions_ptr + rows, mask=is_row, other=-1)
    kv_len = tl.max(position, 0) + 1
    heads = kv_head * GROUP + group
    q = tl.load(
        q_ptr + (rows * q_row + heads * q_head)[:, None] + dims[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    k_base = k_ptr + kv_head.to(tl.int64) * k_head
    v_base = v_ptr + kv_head.to(tl.int64) * v_head
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    if KEY_BLOCK > 0:
        own = position // KEY_BLOCK
        at = tl.maximum(position // query_block - first_query_block, 0)
        flag_base = (
            allowed_ptr
            + kv_head.to(tl.int64) * mask_kv_head
            + group.to(tl.int64) * mask_group
            + at.to(tl.int64) * mask_row
        )
        list_at = kv_head.to(tl.int64) * num_tiles + tile
        count = tl.load(block_count_ptr + list_at)
        parts: tl.constexpr = KEY_BLOCK // KEYS
        for step in range(0, count * parts):
            block = tl.load(block_index_ptr + list_at * max_blocks + step // parts)
            flags = (tl.load(flag_base + block, mask=is_row, other=0) != 0) | (own == block)
            best, total, acc = _attend_keys(
                q, position, flags, best, total, acc,
                block * KEY_BLOCK + step % parts * KEYS, kv_len, k_base, v_base, slot_base,
                scale, logit_cap, window, k_slot, v_slot,
                DIM, DIM_PAD, KEYS, HAS_CAP, HAS_WINDOW, False,
            )  # fmt: skip
    else:
        first = 0
        open_end = tl.min(tl.where(is_row, position, 2147483647), 0) + 1
        open_end = open_end // KEYS * KEYS
        if HAS_WINDOW:
            first = tl.maximum(open_end - window, 0) // KEYS * KEYS
            open_end = first
        for start in range(first, open_end, KEYS):
            best, total, acc = _attend_keys(
                q, position, is_row, best, total, acc,
                start, kv_len, k_base, v_base, slot_base,
                scale, logit_cap, window, k_slot, v_slot,
                DIM, DIM_PAD, KEYS, HAS_CAP, HAS_WINDOW, True,
            )  # fmt: skip
        for start in range(open_end, kv_len, KEYS):
            best, total, acc = _attend_keys(
                q, position, is_row, best, total, acc,
                start, kv_len, k_base, v_base, slot_base,
                scale, logit_cap, window, k_slot, v_slot,
                DIM, DIM_PAD, KEYS, HAS_CAP, HAS_WINDOW, False,
            )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out_ptr + (rows * out_row + heads * out_head)[:, None] + dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_dim[None, :],
    )
