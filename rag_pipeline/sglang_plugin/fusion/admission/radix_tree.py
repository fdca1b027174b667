"""The radix tree and fused KV: only what is exact is ever published as exact.

A fused request matches and publishes the exact namespace like any other, but no further than its first loaded token:
everything behind has seen approximate KV. SGLang then frees the rest with the request; that of a conversation's
turn is copied out before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rag_pipeline.sglang_plugin.fusion.conversations.turns import keep_turn
from rag_pipeline.sglang_plugin.fusion.request.state import state_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import get_runtime


def around_checkpoint(
    original: Callable[..., None], tree: Any, req: Any, *, up_to: int, **kwargs: Any
) -> None:
    """Wrap ``UnifiedRadixCache.checkpoint``: the one door through which a request enters the tree."""
    state, runtime = state_of(req), get_runtime()
    if state is not None and runtime is not None and state.request.conversation and req.finished():
        try:
            pools = tree.req_to_token_pool, tree.token_to_kv_pool_allocator.get_kvcache()
            row = pools[0].req_to_token[req.kv.req_pool_idx]
            keep_turn(runtime, req, state, pools[1], row, up_to)
        except Exception as error:
            runtime.say_fault("turn", error)
            runtime.metrics.count("turns", "not_stored")
    if state is not None and state.exact_limit is not None:
        up_to = min(up_to, max(state.exact_limit, int(req.kv.cache_protected_len)))
    original(tree, req, up_to=up_to, **kwargs)
