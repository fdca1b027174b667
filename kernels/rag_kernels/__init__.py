"""Tensor operations of chunk-KV reuse, one public function each; the device chooses the implementation.

Knows torch, Triton and FlashInfer; knows nothing of SGLang, of chunks' identity or of policies.
"""

from __future__ import annotations

from rag_kernels.attention import (
    ATTENTION_KERNELS,
    AttentionCall,
    AttentionKernel,
    BlockMask,
    LogitRules,
    PositionCausalPlan,
    RequestBlocks,
    RowBlock,
    choose_kernel,
    plan_position_causal,
    position_causal_attention,
    prepare_attention,
)
from rag_kernels.deviation import kv_deviation
from rag_kernels.errors import RotaryUnsupportedError
from rag_kernels.host_copy import to_device, to_host
from rag_kernels.layer_rows import gate_rows, norm_rows, turn_rows
from rag_kernels.linear_rows import linear_rows
from rag_kernels.mass import query_attention_mass
from rag_kernels.mass_batch import MassPlan, attention_mass, plan_attention_mass
from rag_kernels.mean_shift import mean_shift_inplace
from rag_kernels.mean_shift_plan import MeanShiftPlan, join_mean_shifts, plan_mean_shift
from rag_kernels.paged import gather_kv, scatter_kv_inplace
from rag_kernels.registry import Registry
from rag_kernels.rotary import RotarySpec, RotationTable, rerotate_keys
from rag_kernels.rotary_config import rotary_spec_from_config
from rag_kernels.span_load import SpanLoadPlan, load_spans_inplace, plan_span_load
from rag_kernels.sparse import (
    ATTENTION_METHODS,
    AttentionMethod,
    MethodsOfPass,
    create_attention_method,
)

__all__ = [
    "ATTENTION_KERNELS",
    "ATTENTION_METHODS",
    "AttentionCall",
    "AttentionKernel",
    "AttentionMethod",
    "BlockMask",
    "LogitRules",
    "MassPlan",
    "MeanShiftPlan",
    "MethodsOfPass",
    "PositionCausalPlan",
    "Registry",
    "RequestBlocks",
    "RotarySpec",
    "RotaryUnsupportedError",
    "RotationTable",
    "RowBlock",
    "SpanLoadPlan",
    "attention_mass",
    "choose_kernel",
    "create_attention_method",
    "gate_rows",
    "gather_kv",
    "join_mean_shifts",
    "kv_deviation",
    "linear_rows",
    "load_spans_inplace",
    "mean_shift_inplace",
    "norm_rows",
    "plan_attention_mass",
    "plan_mean_shift",
    "plan_position_causal",
    "plan_span_load",
    "position_causal_attention",
    "prepare_attention",
    "query_attention_mass",
    "rerotate_keys",
    "rotary_spec_from_config",
    "scatter_kv_inplace",
    "to_device",
    "to_host",
    "turn_rows",
]
