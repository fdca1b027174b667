"""What a layer does to its rows beside products and attention, one call of the library each; None where it does not serve.

A pass over a few rows spends its time in such operations: torch takes seven for a norm and each begins and ends on one
thread. Results equal those of SGLang's operations but for the order in which squares are added up, and the last bit of
the exponential function.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rag_kernels.native.library import TYPES, GateStruct, NormStruct, TurnStruct, library_for


def norm_rows(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None] | None:
    """Root mean square norm, of the sum with a residual where there is one.

    Parameters
    ----------
    x : Tensor
        ``[R, D]``.
    weight : Tensor
        ``[D]``.
    eps : float
        Added to the mean of the squares.
    residual : Tensor, optional
        ``[R, D]``, added first.

    Returns
    -------
    tuple of (Tensor, Tensor or None) or None
        The normed rows, computed in fp32 and rounded once, and the sum rounded once, None without a residual. None where
        the library does not serve the tensors.
    """
    given = [x, weight] if residual is None else [x, weight, residual]
    library = library_for(*given)
    is_whole = x.dim() == 2 and weight.shape == x.shape[1:]
    if library is None or not is_whole or (residual is not None and residual.shape != x.shape):
        return None
    rows, dim = x.shape
    out = torch.empty(rows, dim, dtype=x.dtype)
    sums = None if residual is None else torch.empty(rows, dim, dtype=x.dtype)
    call = NormStruct(
        x=x.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        sums=None if sums is None else sums.data_ptr(),
        rows=rows,
        dim=dim,
        x_row=x.stride(0),
        residual_row=0 if residual is None else residual.stride(0),
        type=TYPES[x.dtype],
        threads=torch.get_num_threads(),
        eps=eps,
    )
    library.rag_norm(ctypes.byref(call))
    return out, sums


def turn_rows(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    head_dim: int,
    is_neox_style: bool,
) -> tuple[Tensor, Tensor] | None:
    """Rotate queries and keys by their positions.

    Parameters
    ----------
    q, k : Tensor
        ``[R, heads * head_dim]``.
    positions : Tensor
        int64 ``[R]``.
    table : Tensor
        ``[positions, rotary_dim]``: cosines, then sines, of each position; rounded to the type of ``q``.
    head_dim : int
        Numbers of a head; those behind ``rotary_dim`` stay.
    is_neox_style : bool
        Halves are turned against one another, else neighbours.

    Returns
    -------
    tuple of Tensor or None
        New queries and keys, each product rounded as torch does it. None where the library does not serve the tensors.

    Raises
    ------
    IndexError
        A position that is not in the table.
    """
    library = library_for(q, k, table)
    if library is None or positions.dtype != torch.int64 or q.dim() != 2 or k.dim() != 2:
        return None
    rows, rotary_dim = q.shape[0], table.shape[-1]
    is_whole = k.shape[0] == rows == positions.numel() and table.dim() == 2
    if not is_whole or rotary_dim > head_dim or q.shape[1] % head_dim or k.shape[1] % head_dim:
        return None
    q_out, k_out = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
    table, positions = table.contiguous(), positions.contiguous()
    call = TurnStruct(
        q=q.data_ptr(),
        k=k.data_ptr(),
        table=table.data_ptr(),
        q_out=q_out.data_ptr(),
        k_out=k_out.data_ptr(),
        positions=positions.data_ptr(),
        rows=rows,
        table_rows=table.shape[0],
        q_row=q.stride(0),
        k_row=k.stride(0),
        q_heads=q.shape[1] // head_dim,
        k_heads=k.shape[1] // head_dim,
        dim=head_dim,
        rotary_dim=rotary_dim,
        is_neox=is_neox_style,
        type=TYPES[q.dtype],
        threads=torch.get_num_threads(),
    )
    if library.rag_turn(ctypes.byref(call)) != 0:
        raise IndexError(
            f"positions {int(positions.min())}..{int(positions.max())} for angles of {table.shape[0]} positions."
        )
    return q_out, k_out


def gate_rows(x: Tensor) -> Tensor | None:
    """``silu(x[:, :D]) * x[:, D:]``, the first factor rounded.

    Parameters
    ----------
    x : Tensor
        ``[R, 2 * D]``.

    Returns
    -------
    Tensor or None
        ``[R, D]``; None where the library does not serve the tensor.
    """
    library = library_for(x)
    if library is None or x.dim() != 2 or x.shape[1] % 2:
        return None
    rows, dim = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, dim, dtype=x.dtype)
    call = GateStruct(
        x=x.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        dim=dim,
        x_row=x.stride(0),
        type=TYPES[x.dtype],
        threads=torch.get_num_threads(),
    )
    library.rag_gate(ctypes.byref(call))
    return out
