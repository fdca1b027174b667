"""Linear map of few bf16 rows by the library; None where torch's own product is the one to take.

Measured against torch (oneDNN) on an AMD EPYC with AVX512-BF16, weights of SmolLM2-135M out of the caches, one thread,
CPU time: 50 rows take 0.95 of its time, 145 rows 0.99, 395 rows 0.92. Two threads bring 1.88 at 50 rows where torch gains
1.73, because no thread is left without columns. One result in ten thousand differs in its last bit.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from rag_kernels.native.library import LinearStruct, load_library

_DEPTH_STEP, _COLUMN_STEP = 32, 16
_MOST_ROWS = 1024
"""Rows above which torch's blocks of rows pay off."""


@functools.cache
def _serves() -> ctypes.CDLL | None:
    """The library where the CPU multiplies bf16 vectors and has no tiles (AMX), which torch uses and this does not."""
    library = load_library()
    if library is None or torch.cpu._is_amx_tile_supported():
        return None
    empty = LinearStruct(rows=0, depth=_DEPTH_STEP, columns=_COLUMN_STEP, threads=1)
    return library if library.rag_linear(ctypes.byref(empty)) == 0 else None


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``x @ weight.T + bias``, summed in fp32 and rounded once.

    Parameters
    ----------
    x : Tensor
        bf16 ``[R, K]``.
    weight : Tensor
        bf16 ``[N, K]``.
    bias : Tensor, optional
        bf16 ``[N]``.

    Returns
    -------
    Tensor or None
        bf16 ``[R, N]``; None for other types or devices, more than 1,024 rows, sizes that are no multiples of a vector,
        and CPUs without such vectors or with something better.
    """
    if x.dim() != 2 or weight.dim() != 2 or not 0 < x.shape[0] <= _MOST_ROWS:
        return None
    (rows, depth), columns = x.shape, weight.shape[0]
    if weight.shape[1] != depth or depth % _DEPTH_STEP or columns % _COLUMN_STEP or not columns:
        return None
    for one in (x, weight) if bias is None else (x, weight, bias):
        if one.device.type != "cpu" or one.dtype != torch.bfloat16 or one.stride(-1) != 1:
            return None
    if x.stride(0) % 2 or weight.stride(0) % 2:  # pairs are read as one word
        return None
    library = _serves()
    if library is None or (bias is not None and bias.shape != (columns,)):
        return None
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    call = LinearStruct(
        x=x.data_ptr(),
        w=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        depth=depth,
        columns=columns,
        x_row=x.stride(0),
        w_row=weight.stride(0),
        threads=torch.get_num_threads(),
    )
    library.rag_linear(ctypes.byref(call))
    return out
