"""What travels between a client and the engine: fusion's fields of a request, its report, the stream of an answer.

Used on both sides; nothing here touches SGLang.
"""

from __future__ import annotations

from rag_pipeline.protocol.fusion_choice import FusionChoice, FusionFields
from rag_pipeline.protocol.fusion_request import (
    DENSE_ATTENTION,
    LEFT_ALONE,
    PARAM_PREFIX,
    PREFIX_POLICY,
    FusionRequest,
    RequestError,
    build_requests,
)
from rag_pipeline.protocol.memory_step import (
    MemoryFields,
    MemoryLoad,
    MemoryStore,
    memory_id,
    memory_report,
)
from rag_pipeline.protocol.messages import (
    GenerationPiece,
    GenerationRequest,
    SamplingOptions,
    Usage,
)
from rag_pipeline.protocol.report import (
    FUSION_KEY,
    METRIC_PREFIX,
    finish_reason,
    fusion_report,
    usage_from_meta,
)
from rag_pipeline.protocol.stream import AbortedError, StreamReader

__all__ = [
    "DENSE_ATTENTION",
    "FUSION_KEY",
    "LEFT_ALONE",
    "METRIC_PREFIX",
    "PARAM_PREFIX",
    "PREFIX_POLICY",
    "AbortedError",
    "FusionChoice",
    "FusionFields",
    "FusionRequest",
    "GenerationPiece",
    "GenerationRequest",
    "MemoryFields",
    "MemoryLoad",
    "MemoryStore",
    "RequestError",
    "SamplingOptions",
    "StreamReader",
    "Usage",
    "build_requests",
    "finish_reason",
    "fusion_report",
    "memory_id",
    "memory_report",
    "usage_from_meta",
]
