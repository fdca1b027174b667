"""What the loaded model is, for the identity of chunk KV and for moving it."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from torch import Tensor

from chunk_cache import KVContext, KVLayout, canonical_json, layout_of_pool
from chunk_cache.policies import qkv_share
from rag_kernels import RotarySpec, RotaryUnsupportedError, rotary_spec_from_config
from rag_pipeline.sglang_plugin.fusion.runtime.model_identity import (
    describe_settings,
    fingerprint_weights,
)
from rag_pipeline.sglang_plugin.fusion.runtime.quantised import (
    refuse_kv_scales,
    refuse_quantised_layers,
)
from rag_pipeline.sglang_plugin.fusion.runtime.support import refuse_model

_MAX_ANGLE_ERROR = 2e-2
"""Radians. A bf16 cos/sin table alone is off by up to 4e-3; a wrong base or scaling by far more."""
_TABLE_ROWS = 256


class UnsupportedModelError(ValueError):
    """The loaded model cannot be fused; the message is the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModelFacts:
    """Everything fusion needs to know of the loaded model; one per process.

    Attributes
    ----------
    layers : tuple
        ``RadixAttention`` modules, by layer.
    rotary : RotarySpec
        Rotation of the keys, checked against the table that the model itself uses.
    layout : KVLayout
        What the pool holds per token, and so do records made here.
    fingerprint : str
        Hash of the weights of this rank as they were loaded first.
    context_fields : dict
        Fields of :class:`KVContext` that do not depend on the request.
    qkv_share : float
        Share of a layer's linear work that is the query, key and value projection.
    model_path : str
        Folder that the weights were loaded from.
    """

    layers: tuple[Any, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    rotary: RotarySpec
    layout: KVLayout
    fingerprint: str
    context_fields: dict[str, Any]
    qkv_share: float
    model_path: str = ""

    @property
    def num_layers(self) -> int:
        """Attention layers."""
        return len(self.layers)

    def context(self, *, prefix_digest: str, tenant: str) -> KVContext:
        """Context of chunks computed behind a prefix, for one tenant."""
        return KVContext(prefix_digest=prefix_digest, tenant=tenant, **self.context_fields)


def read_model(model_runner: Any, *, tp_rank: int, tp_size: int) -> ModelFacts:
    """Read the loaded model.

    Parameters
    ----------
    model_runner : sglang.srt.model_executor.model_runner.ModelRunner
        After the model is loaded and its pools exist.
    tp_rank, tp_size : int
        Place in the attention tensor-parallel group.

    Raises
    ------
    UnsupportedModelError
        With the reason.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    modules = dict(model_runner.model.named_modules())
    named = [(name, m) for name, m in modules.items() if isinstance(m, RadixAttention)]
    named.sort(key=lambda pair: int(pair[1].layer_id))
    layers = [module for _, module in named]
    config = model_runner.model_config.hf_config
    pool = model_runner.token_to_kv_pool
    reason = (
        refuse_model(config, pool, layers)
        or refuse_kv_scales(layers, _backends(model_runner))
        or refuse_quantised_layers(model_runner.model, model_runner.dtype)
    )
    if reason is not None:
        raise UnsupportedModelError(reason)
    rotary, table = _read_rotary(config, [modules[name.rpartition(".")[0]] for name, _ in named])
    fingerprint = fingerprint_weights(model_runner.model)
    first = layers[0]
    text = getattr(config, "text_config", None) or config
    return ModelFacts(
        layers=tuple(layers),
        num_q_heads=int(first.tp_q_head_num),
        num_kv_heads=int(first.tp_k_head_num),
        head_dim=int(first.qk_head_dim),
        scaling=float(first.scaling),
        rotary=rotary,
        layout=layout_of_pool(pool),
        fingerprint=fingerprint,
        context_fields={
            "model_fingerprint": fingerprint,
            "dtype": str(model_runner.dtype).removeprefix("torch."),
            "kv_dtype": str(pool.dtype).removeprefix("torch."),
            "rope": canonical_json(
                {
                    "inv_freq": hashlib.blake2b(
                        rotary.inv_freq.numpy().tobytes(), digest_size=16
                    ).hexdigest(),
                    "dim": rotary.rotary_dim,
                    "neox": rotary.is_neox_style,
                    # What the model multiplies by: it also holds the factor that YaRN puts on keys.
                    "table": hashlib.blake2b(
                        table[:_TABLE_ROWS].float().cpu().contiguous().numpy().tobytes(),
                        digest_size=16,
                    ).hexdigest(),
                }
            ),
            "settings": describe_settings(
                config, model_runner.server_args, model_runner.prefill_attention_backend_str
            ),
            "tp_rank": tp_rank,
            "tp_size": tp_size,
        },
        qkv_share=qkv_share(
            int(text.hidden_size),
            int(text.num_attention_heads),
            int(text.num_key_value_heads),
            int(first.qk_head_dim),
            int(text.intermediate_size),
        ),
        model_path=str(model_runner.model_config.model_path),
    )


def _backends(model_runner: Any) -> tuple[str, str]:
    """Attention backends that prefill and decode."""
    return (
        model_runner.prefill_attention_backend_str,
        model_runner.decode_attention_backend_str,
    )


def _read_rotary(config: Any, attention_modules: list[Any]) -> tuple[RotarySpec, Tensor]:
    """Spec of the configuration, accepted only if the model's own tables say the same, and the table."""
    embeddings = {id(e): e for m in attention_modules if (e := getattr(m, "rotary_emb", None))}
    if len(embeddings) != 1:
        raise UnsupportedModelError(
            f"{len(embeddings)} rotary embeddings: every layer must share one for keys to be movable"
        )
    (embedding,) = embeddings.values()
    try:
        spec = rotary_spec_from_config(config, bool(getattr(embedding, "is_neox_style", True)))
    except RotaryUnsupportedError as error:
        raise UnsupportedModelError(str(error)) from None
    table = getattr(embedding, "cos_sin_cache", None)
    if table is None:
        raise UnsupportedModelError(
            "the rotary embedding has no table to check the frequencies with"
        )
    error_rad = spec.cache_error(table)
    if not error_rad <= _MAX_ANGLE_ERROR:
        raise UnsupportedModelError(
            f"the model's rotary table is {error_rad:.3g} rad away from its configuration's frequencies"
        )
    return spec, table
