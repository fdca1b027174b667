"""An engine's report on requests with a memory, as an engine gives it that has room for all records."""

from __future__ import annotations

from typing import Any

from rag_pipeline.protocol import FUSION_KEY, GenerationRequest, memory_id


def meta_of(request: GenerationRequest) -> dict[str, Any]:
    """``meta_info`` of a request whose records are all there; what it stores is named by what it holds."""
    memory, ids = request.fusion.memory, request.input_ids
    told: dict[str, Any] = {}
    if memory is not None and memory.store is not None:
        start = memory.load_end or request.fusion.prefix_len
        told["stored"] = True
        told["id"] = memory_id(
            memory.load[0].id if memory.load else "",
            ids[: request.fusion.prefix_len],
            ids[start : memory.store.end],
            ids[memory.store.end :],
            memory.store.rule,
            memory.store.budget,
            memory.store.own,
            memory.store.own_share,
        )
    elif memory is not None:
        told["loaded"] = memory.load_end - request.fusion.prefix_len
    kinds = dict.fromkeys(("exact_prefix_tokens", "reused_tokens", "recomputed_tokens"), 0)
    meta = {"completion_tokens": 1, "finish_reason": {"type": "stop"}}
    return {**meta, FUSION_KEY: {"memory": told, **kinds}}
