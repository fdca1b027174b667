"""NGRAM speculation without compiled kernels: what SGLang's worker calls on a GPU, in plain torch.

SGLang's NGRAM worker guesses the next tokens from text it has seen, as a tree per request, and has the model verify
them in one batch. The guesses need no GPU; five small kernels around them have none for an out-of-tree platform.
:func:`install` puts the functions here in their places.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rag_pipeline.sglang_plugin.cpu.draft_trees import (
    keep_top_k,
    keep_top_p,
    read_tree,
    sample_tree,
    verify_tree,
)
from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_targets, fail_hard, verify_targets
from rag_pipeline.sglang_plugin.internals import SPECULATING

__all__ = ["cache_locs", "install"]

_UTILS = "sglang.srt.speculative.spec_utils."
_EAGLE = "sglang.srt.speculative.eagle_utils."
_TREE = ("candidates", "retrieve_index", "retrieve_next_token", "retrieve_next_sibling")
_ROWS = ("req_pool_indices", "req_to_token")
_TARGETS = tuple(
    HookTarget(path=path, kind="assigned", why=why, params=params)
    for path, why, params in (
        (
            f"{_EAGLE}verify_tree_greedy_func",
            "which drafts are what the model says",
            ("predicts", "accept_index", "accept_token_num", *_TREE, "target_predict", "topk"),
        ),
        (
            f"{_UTILS}fill_front_out_cache_loc_func",
            "slots that the accepted drafts move to",
            ("num_front", "out_cache_loc", "front_out_cache_loc"),
        ),
        (
            f"{_UTILS}fill_accept_out_cache_loc_func",
            "slots that they come from",
            ("accept_index", "out_cache_loc", "accept_out_cache_loc", "size"),
        ),
        (
            "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func",
            "slots for a tree are written into the table of slots",
            (*_ROWS, "start_offset", "end_offset", "out_cache_loc", "batch_size"),
        ),
        (
            "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup",
            "rows of the pool move by indexing, not by a Triton kernel",
            (),
        ),
    )
)


def install() -> type[Any]:
    """Put the functions of this module in the places of SGLang's kernels in this process; idempotent.

    Returns
    -------
    type
        SGLang's NGRAM worker.
    """
    from sglang.srt.mem_cache import allocation, memory_pool

    worker = _import_worker()
    from sglang.srt.speculative import eagle_utils, spec_utils

    with fail_hard():
        rows = (*_TARGETS, *SPECULATING)
        add_targets(rows)
        verify_targets(rows)
        eagle_utils.verify_tree_greedy_func = verify_tree
        # None of these exists here; SGLang's signatures are those of its GPU kernels.
        eagle_utils.tree_speculative_sampling_target_only = sample_tree
        eagle_utils.top_k_renorm_prob = keep_top_k
        eagle_utils.top_p_renorm_prob = keep_top_p
        spec_utils.fill_front_out_cache_loc_func = front_slots
        spec_utils.fill_accept_out_cache_loc_func = accepted_slots
        allocation.assign_req_to_token_pool_func = assign_slots
        memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup = _move_by_indexing
    return worker


def _import_worker() -> type[Any]:
    """Import the worker; its module asks for a compiled kernel by name, which :func:`read_tree` stands in for."""
    name = "sgl_kernel.speculative"
    stand_in = ModuleType(name)
    stand_in.reconstruct_indices_from_tree_mask = read_tree  # type: ignore[attr-defined]
    missing = name not in sys.modules
    if missing:
        sys.modules[name] = stand_in
    try:
        from sglang.srt.speculative.ngram_worker import NGRAMWorker
    finally:
        if missing:
            del sys.modules[name]
    worker: type[Any] = NGRAMWorker
    return worker


def _move_by_indexing(pool: Any) -> None:
    pool._kv_copy_config = None
    pool.use_native_move_kv_cache = True


def cache_locs(
    *,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> Tensor:
    """Slots of positions ``[start, end)`` of each request, one after the other; int64."""
    parts = [
        req_to_token[row, start:end]
        for row, start, end in zip(
            req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
        )
    ]
    return torch.cat(parts).to(torch.int64)


def assign_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Write slots, packed by request, into the table at positions ``[start, end)`` of each."""
    done = 0
    rows = req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist()
    for row, start, end in zip(*rows, strict=True):
        count = end - start
        req_to_token[row, start:end] = out_cache_loc[done : done + count].to(req_to_token.dtype)
        done += count


def front_slots(num_front: Tensor, out_cache_loc: Tensor, front_out_cache_loc: Tensor) -> None:
    """Write the first ``num_front[i]`` slots of each request's window ``i``, packed."""
    counts = num_front.tolist()
    window = out_cache_loc.view(len(counts), -1)
    parts = torch.cat([window[row, :count] for row, count in enumerate(counts)])
    front_out_cache_loc[: parts.numel()] = parts


def accepted_slots(
    accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor, size: int
) -> None:
    """Write the slots of accepted nodes, packed; ``accept_index`` is -1 where none was."""
    places = accept_index.flatten()
    slots = out_cache_loc[places[places >= 0].long()]
    accept_out_cache_loc[: slots.numel()] = slots
