"""The radix tree and fused KV: only what is exact is ever published as exact, and what a method computed as its own.

A fused request matches and publishes the exact namespace like any other, but no further than its first loaded token:
everything behind has seen approximate KV. SGLang then frees the rest with the request; that of a conversation's
turn is copied out before. In the space of a method both ends are cut to its units: rows of a part of one may have
chosen their keys together with rows that another prompt does not have. So nothing is published either from where the
tree holds another prompt's part of a unit: the tree would put its rows in the place of the request's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rag_pipeline.sglang_plugin.fusion.conversations.base import FinishedTurn
from rag_pipeline.sglang_plugin.fusion.memory.leasing import matched_until
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState, state_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import get_runtime

_NO_FAULTS = ("miss", "in_exact_prefix")
"""Reasons to prefill as usual that say nothing against the KV that was computed."""


def around_match_prefix(original: Callable[..., Any], tree: Any, params: Any) -> Any:
    """Wrap ``UnifiedRadixCache.match_prefix``: in a method's space a match ends where one of its units does.

    One of a prompt with a memory ends in front of its slots.
    """
    found = original(tree, params)
    state, runtime = None if params.req is None else state_of(params.req), get_runtime()
    if state is None or runtime is None:
        return found
    most = matched_until(state)
    if most is not None and _length(found) > most:
        return original(tree, dataclasses.replace(params, key=params.key[:most]))
    if state.unit == 1:
        return found
    whole = math.lcm(state.unit, runtime.page_size)
    while (count := _length(found)) % whole:
        shorter = params.key[: count - count % whole]
        found = original(tree, dataclasses.replace(params, key=shorter))
    return found


def around_checkpoint(
    original: Callable[..., None], tree: Any, req: Any, *, up_to: int, **kwargs: Any
) -> None:
    """Wrap ``UnifiedRadixCache.checkpoint``: the one door through which a request enters the tree."""
    state, runtime = state_of(req), get_runtime()
    if state is not None and runtime is not None and state.request.conversation and req.finished():
        try:
            pools = tree.req_to_token_pool, tree.token_to_kv_pool_allocator.get_kvcache()
            row = pools[0].req_to_token[req.kv.req_pool_idx]
            turn = finished_turn(req, state, pools[1], row, up_to)
            if turn is not None:
                runtime.conversations.keep(turn)
        except Exception as error:
            runtime.say_fault("turn", error)
            runtime.metrics.count("turns", "not_stored")
    if state is not None and state.exact_limit is not None:
        up_to = min(up_to, max(state.exact_limit, int(req.kv.cache_protected_len)))
    if state is not None and runtime is not None and state.unit > 1:
        whole = math.lcm(state.unit, runtime.page_size)
        up_to -= up_to % whole
        if whole > runtime.page_size and up_to > req.kv.cache_protected_len:
            up_to = _own_until(tree, req, up_to, whole)
        up_to = max(up_to, int(req.kv.cache_protected_len))
    original(tree, req, up_to=up_to, **kwargs)


def _own_until(tree: Any, req: Any, up_to: int, whole: int) -> int:
    """Where the first unit begins of which the tree holds a part that goes on otherwise; `up_to` where there is none."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    ids = req.full_untruncated_fill_ids[:up_to]
    key = RadixKey(ids, req.extra_key, cache_salt=req.cache_salt)
    there = _length(tree.match_prefix(MatchPrefixParams(key=key)))
    return there - there % whole if there % whole else up_to


def _length(found: Any) -> int:
    """Tokens of a match, on the device and on the host."""
    return int(found.device_prefix_len) + int(found.host_hit_length)


def finished_turn(
    req: Any, state: RequestState, pool: Any, row: torch.Tensor, kv_len: int
) -> FinishedTurn | None:
    """Describe a finished request to the conversation memory.

    Parameters
    ----------
    req : Req
        Finished, its slots not yet given back.
    state : RequestState
        Of the request.
    pool : MHATokenToKVPool
        The paged pool.
    row : Tensor
        Slots of the request by position.
    kv_len : int
        Positions whose KV the request owns.

    Returns
    -------
    FinishedTurn or None
        None without a conversation, and after a fault or an abort: nothing may be kept then.
    """
    if not state.request.conversation or not state.done:
        return None
    told = state.report.fallback
    if told and (told not in _NO_FAULTS or state.exact_limit is not None):
        return None
    if _was_aborted(req):
        return None
    # With overlapped scheduling the last token's KV may still be on its way: the next turn computes it.
    written = len(req.origin_input_ids) + len(req.output_ids_through_stop) - 1
    end = min(kv_len, written)
    return FinishedTurn(
        state=state,
        tenant=RadixNamespace(req.extra_key, req.cache_salt),
        ids=np.array(req.full_untruncated_fill_ids[:end], dtype=np.int64),
        pool=pool,
        slots=row[:end].to(torch.int64),
    )


def _was_aborted(req: Any) -> bool:
    if req.finished_reason is None:
        return False
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return isinstance(req.finished_reason, FINISH_ABORT)
