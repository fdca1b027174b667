"""The built library in this process: loaded once, its functions with their types."""

from __future__ import annotations

import ctypes
import functools
import logging
import os

import torch

from rag_kernels.native.build import BuildError, built_library

logger = logging.getLogger(__name__)

SWITCH = "RAG_PIPELINE_CPU_KERNELS"
"""Environment variable: ``native`` (default) or ``torch``, which neither builds nor loads the library."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of tensors that the library knows, and what it calls them."""


class RequestStruct(ctypes.Structure):
    """``RagRequest`` of the source: rows, slots and mask of one request."""

    _fields_ = (
        ("row_lo", ctypes.c_int64),
        ("row_hi", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("allowed", ctypes.c_void_p),
        ("mask_heads", ctypes.c_int64),
        ("mask_rows", ctypes.c_int64),
        ("mask_cols", ctypes.c_int64),
        ("query_block", ctypes.c_int64),
        ("key_block", ctypes.c_int64),
        ("first_query_block", ctypes.c_int64),
    )


class CallStruct(ctypes.Structure):
    """``RagCall`` of the source: tensors, their strides in numbers, and what to compute."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("requests", ctypes.c_void_p),
        ("num_requests", ctypes.c_int64),
        ("q_row", ctypes.c_int64),
        ("q_head", ctypes.c_int64),
        ("k_slot", ctypes.c_int64),
        ("k_head", ctypes.c_int64),
        ("v_slot", ctypes.c_int64),
        ("v_head", ctypes.c_int64),
        ("q_heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("q_type", ctypes.c_int64),
        ("kv_type", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
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
            "CPU attention runs on torch's operations, which is slower: %s.", str(error).rstrip(".")
        )
        return None
    library.rag_attend.argtypes = (ctypes.POINTER(CallStruct),)
    library.rag_attend.restype = ctypes.c_int
    return library
