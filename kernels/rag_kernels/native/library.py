"""The built library in this process: loaded once, its functions with their types."""

from __future__ import annotations

import ctypes
import functools
import logging
import os

import torch
from torch import Tensor

from rag_kernels.native.build import BuildError, built_library

logger = logging.getLogger(__name__)

SWITCH = "RAG_PIPELINE_CPU_KERNELS"
"""Environment variable: ``native`` (default) or ``torch``, which neither builds nor loads the library."""

LARGEST_HEAD = 576
"""Most dimensions of a head that it takes: DeepSeek's latent of 512 and its position part of 64."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of tensors that the library knows, and what it calls them."""


class RequestStruct(ctypes.Structure):
    """``RagRequest`` of the source: rows, slots and mask of one request."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("row_lo", "row_hi")),
        *((name, ctypes.c_void_p) for name in ("slots", "allowed")),
        *((name, ctypes.c_int64) for name in ("mask_heads", "mask_rows", "mask_cols")),
        *((name, ctypes.c_int64) for name in ("query_block", "key_block", "first_query_block")),
    )


class CallStruct(ctypes.Structure):
    """``RagCall`` of the source: tensors, their strides in numbers, and what to compute."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "order", "positions")),
        *((name, ctypes.c_void_p) for name in ("requests", "sinks")),
        *((name, ctypes.c_int64) for name in ("num_requests", "q_row", "q_head", "k_slot")),
        *((name, ctypes.c_int64) for name in ("k_head", "v_slot", "v_head", "q_heads")),
        *((name, ctypes.c_int64) for name in ("kv_heads", "dim", "q_type", "kv_type")),
        *((name, ctypes.c_int64) for name in ("window", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
    )


class MassStruct(ctypes.Structure):
    """``RagMass`` of the source: a question's rows, and where their mass goes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "out", "positions", "slots")),
        *((name, ctypes.c_int64) for name in ("rows", "kv_len", "tile", "q_row", "q_head")),
        *((name, ctypes.c_int64) for name in ("k_slot", "k_head", "q_heads", "kv_heads", "dim")),
        *((name, ctypes.c_int64) for name in ("type", "threads")),
        ("scale", ctypes.c_float),
    )


class ShiftStruct(ctypes.Structure):
    """``RagShift`` of the source: pools, new and old rows, and the plan of a mean shift."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k_pool", "v_pool", "k_new", "v_new")),
        *((name, ctypes.c_void_p) for name in ("k_old", "v_old", "probe_rows", "probe_slots")),
        *((name, ctypes.c_void_p) for name in ("probe_ends", "other_slots", "other_ends")),
        *((name, ctypes.c_void_p) for name in ("weights", "probe_cos", "probe_sin")),
        *((name, ctypes.c_void_p) for name in ("other_cos", "other_sin")),
        *((name, ctypes.c_int64) for name in ("chunks", "k_slot", "k_head", "v_slot", "v_head")),
        *((name, ctypes.c_int64) for name in ("k_new_row", "v_new_row", "k_old_row")),
        *((name, ctypes.c_int64) for name in ("v_old_row", "heads", "dim", "rotary_dim")),
        *((name, ctypes.c_int64) for name in ("is_neox", "type", "threads")),
    )


class LoadStruct(ctypes.Structure):
    """``RagLoad`` of the source: the spans of keys or of values, their angles, and the pool."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pool", "spans", "slots", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("num_spans", "tokens", "slot", "pool_head")),
        *((name, ctypes.c_int64) for name in ("heads", "dim", "rotary_dim", "is_neox", "type")),
    )


class NormStruct(ctypes.Structure):
    """``RagNorm`` of the source: rows, what is added to them, and the weight of the norm."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "out", "sums")),
        *((name, ctypes.c_int64) for name in ("rows", "dim", "x_row", "residual_row")),
        *((name, ctypes.c_int64) for name in ("type", "threads")),
        ("eps", ctypes.c_float),
    )


class TurnStruct(ctypes.Structure):
    """``RagTurn`` of the source: queries and keys, their positions, and the table of angles."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "table", "q_out", "k_out", "positions")),
        *((name, ctypes.c_int64) for name in ("rows", "table_rows", "q_row", "k_row", "q_heads")),
        *((name, ctypes.c_int64) for name in ("k_heads", "dim", "rotary_dim", "is_neox")),
        *((name, ctypes.c_int64) for name in ("type", "threads")),
    )


class GateStruct(ctypes.Structure):
    """``RagGate`` of the source: rows of a gate and of what it lets through."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "dim", "x_row", "type", "threads")),
    )


class LinearStruct(ctypes.Structure):
    """``RagLinear`` of the source: rows, weights and what is added."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "depth", "columns", "x_row", "w_row")),
        ("threads", ctypes.c_int64),
    )


class SaleGroupStruct(ctypes.Structure):
    """``RagSaleGroup`` of the source: row blocks that look at the same keys."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("candidates", "end", "blocks", "width")),
        *((name, ctypes.c_int64) for name in ("first_block", "first_row")),
    )


class SaleStruct(ctypes.Structure):
    """``RagSale`` of the source: queries and keys of a request, its row blocks, and the mask to fill."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "order", "slots", "mean", "tau")),
        *((name, ctypes.c_void_p) for name in ("groups", "blocks", "rows", "positions")),
        ("allowed", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_groups", "mask_rows", "mask_cols")),
        *((name, ctypes.c_int64) for name in ("key_block", "q_row", "q_head", "k_slot")),
        *((name, ctypes.c_int64) for name in ("k_head", "q_heads", "kv_heads", "dim")),
        *((name, ctypes.c_int64) for name in ("q_type", "kv_type", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "dense_tau", "largest_tau")),
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Build the library if need be and load it; None where that fails, which is said once per process.

    Notes
    -----
    Its functions release the interpreter lock. They use the OpenMP threads of torch, so they are as safe behind a
    ``fork`` as torch's own operations: a process that used several threads must not be forked.
    """
    wanted = os.environ.get(SWITCH, "native")
    if wanted != "native":
        if wanted != "torch":
            logger.warning("%s is %r; allowed are 'native' and 'torch'.", SWITCH, wanted)
        return None
    try:
        library = ctypes.CDLL(str(built_library()))
    except (BuildError, OSError) as error:
        logger.warning(
            "attention on the CPU runs on torch's operations, which is slower: %s.",
            str(error).rstrip("."),
        )
        return None
    for function, struct in (
        (library.rag_attend, CallStruct),
        (library.rag_mass, MassStruct),
        (library.rag_mean_shift, ShiftStruct),
        (library.rag_sale, SaleStruct),
        (library.rag_norm, NormStruct),
        (library.rag_turn, TurnStruct),
        (library.rag_gate, GateStruct),
        (library.rag_linear, LinearStruct),
    ):
        function.argtypes = (ctypes.POINTER(struct),)
        function.restype = ctypes.c_int
    library.rag_load.argtypes = (ctypes.POINTER(LoadStruct), ctypes.c_int64, ctypes.c_int64)
    library.rag_load.restype = ctypes.c_int
    return library


def library_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, where all tensors are of one type that it knows, on the CPU, and rows lie in one piece; else None."""
    dtype = tensors[0].dtype
    if dtype not in TYPES:
        return None
    for one in tensors:
        if one.device.type != "cpu" or one.dtype != dtype or one.stride(-1) != 1:
            return None
    return load_library()


def check_slots(slots: Tensor, *pools: Tensor) -> None:
    """Refuse slots that one of the pools does not have: the library does not look where it reads and writes."""
    if not slots.numel():
        return
    least, most = (int(slot) for slot in slots.aminmax())
    room = min(pool.shape[0] for pool in pools)
    if least < 0 or most >= room:
        raise IndexError(f"slots {least}..{most} for a pool of {room} slots.")
