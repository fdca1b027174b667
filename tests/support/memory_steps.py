"""An engine's report on requests with a memory, as an engine gives it that has room for all records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rag_pipeline.protocol import FUSION_KEY, FusionRequest, GenerationRequest, memory_id


def stored_id(fusion: FusionRequest, ids: Sequence[int]) -> str:
    """Name of the record that a request has stored: by everything that the record depends on."""
    memory = fusion.memory
    assert memory is not None
    assert memory.store is not None
    start = memory.load_end or fusion.prefix_len
    return memory_id(
        memory.load[0].id if memory.load else "",
        ids[: fusion.prefix_len],
        ids[start : memory.store.end],
        ids[memory.store.end :],
        memory.store.rule,
        memory.store.budget,
        memory.store.own,
        memory.store.own_share,
    )


def meta_of(request: GenerationRequest) -> dict[str, Any]:
    """``meta_info`` of a request whose records are all there; what it stores is named by what it holds."""
    memory = request.fusion.memory
    told: dict[str, Any] = {}
    if memory is not None and memory.store is not None:
        told |= {"stored": True, "id": stored_id(request.fusion, request.input_ids)}
    elif memory is not None:
        told["loaded"] = memory.load_end - request.fusion.prefix_len
    kinds = dict.fromkeys(("exact_prefix_tokens", "reused_tokens", "recomputed_tokens"), 0)
    meta = {"completion_tokens": 1, "finish_reason": {"type": "stop"}}
    return {**meta, FUSION_KEY: {"memory": told, **kinds}}
