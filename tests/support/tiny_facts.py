"""Facts of a model of one layer and one head, for tests of what lives around a model."""

from __future__ import annotations

from typing import Any

from chunk_cache import layout_named
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import ModelFacts


def tiny_facts(fingerprint: str, **context: Any) -> ModelFacts:
    """One layer with one head of two dimensions; fields of its KV's context are added to the usual ones."""
    return ModelFacts(
        layers=(None,),
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=2,
        scaling=1.0,
        rotary=None,
        layout=layout_named("heads"),
        fingerprint=fingerprint,
        context_fields={
            "model_fingerprint": fingerprint,
            "dtype": "float32",
            "kv_dtype": "float32",
            "rope": "{}",
            **context,
        },
        qkv_share=0.1,
    )
