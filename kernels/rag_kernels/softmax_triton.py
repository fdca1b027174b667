"""Steps of a softmax over paged keys, for Triton kernels that read the keys run by run."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot_keys(
    q, k_base, slot_base, keys, is_key, k_slot, DIM: tl.constexpr, DIM_PAD: tl.constexpr
):  # fmt: skip
    """Products of the rows with the keys, fp32 ``[rows, keys]``, and the slots of the keys; 0 where there is no key."""
    dims = tl.arange(0, DIM_PAD)
    slot = tl.load(slot_base + keys, mask=is_key, other=0)
    k = tl.load(
        k_base + slot[None, :] * k_slot + dims[:, None],
        mask=(dims < DIM)[:, None] & is_key[None, :],
        other=0.0,
    )
    return tl.dot(q, k.to(q.dtype), input_precision="ieee"), slot


@triton.jit
def raised(best, its_best):
    """Largest logit after a further run of keys, the level of exponents, and the factor of what was summed before.

    A row that has seen no key yet (padding, or before its window) keeps a level of 0.
    """
    new_best = tl.maximum(best, its_best)
    level = tl.where(new_best == float("-inf"), 0.0, new_best)
    return new_best, level, tl.exp2(best - level)
