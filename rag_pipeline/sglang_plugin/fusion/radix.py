"""The radix tree and fused KV: only what is exact is ever published as exact.

A fused request matches and publishes the exact namespace like any other, but no further than its first loaded token:
everything behind has seen approximate KV. SGLang then frees the rest with the request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rag_pipeline.sglang_plugin.fusion.request_state import state_of


def around_checkpoint(
    original: Callable[..., None], tree: Any, req: Any, *, up_to: int, **kwargs: Any
) -> None:
    """Wrap ``UnifiedRadixCache.checkpoint``: the one door through which a request enters the tree."""
    state = state_of(req)
    if state is not None and state.exact_limit is not None:
        up_to = min(up_to, max(state.exact_limit, int(req.kv.cache_protected_len)))
    original(tree, req, up_to=up_to, **kwargs)
