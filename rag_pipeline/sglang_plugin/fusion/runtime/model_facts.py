"""What the loaded model is, for the identity of chunk KV and for moving it."""

from __future__ import annotations

import dataclasses
from typing import Any

from chunk_cache import KVContext, KVLayout, canonical_json, layout_of_pool
from chunk_cache.policies import latent_qkv_share, qkv_share
from rag_kernels import RotarySpec
from rag_pipeline.sglang_plugin.fusion.runtime.model_identity import (
    describe_settings,
    fingerprint_weights,
)
from rag_pipeline.sglang_plugin.fusion.runtime.quantised import (
    refuse_kv_scales,
    refuse_quantised_layers,
)
from rag_pipeline.sglang_plugin.fusion.runtime.rotations import (
    UnsupportedModelError,
    read_rotations,
)
from rag_pipeline.sglang_plugin.fusion.runtime.support import refuse_model
from rag_pipeline.sglang_plugin.tpla.slices import LatentSlices

__all__ = ["ModelFacts", "UnsupportedModelError", "read_model"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModelFacts:
    """Everything fusion needs to know of the loaded model; one per process.

    Attributes
    ----------
    layers : tuple
        ``RadixAttention`` modules, by layer.
    rotary : RotarySpec
        Rotation of the keys, checked against the table that the model itself uses; of layer 0 where layers differ.
    rotary_by_layer : tuple of RotarySpec
        Rotation of each layer where they differ, one object per rotation; empty where all are alike.
    layout : KVLayout
        What the pool holds per token, and so do records made here.
    fingerprint : str
        Hash of the weights of this rank as they were loaded first.
    context_fields : dict
        Fields of :class:`KVContext` that do not depend on the request.
    qkv_share : float
        Share of a layer's linear work that is the query, key and value projection.
    slices : LatentSlices or None
        Where each rank keeps a slice of every latent (TPLA).
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
    slices: LatentSlices | None = None
    model_path: str = ""
    rotary_by_layer: tuple[RotarySpec, ...] = ()

    @property
    def rotaries(self) -> tuple[RotarySpec, ...]:
        """Every rotation that some layer has, each once."""
        return tuple({id(one): one for one in self.rotary_by_layer or (self.rotary,)}.values())

    def rotary_of(self, layer: int) -> RotarySpec:
        """Rotation of one layer's keys."""
        return self.rotary_by_layer[layer] if self.rotary_by_layer else self.rotary

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
    named = [
        (name, module)
        for name, module in modules.items()
        if isinstance(module, RadixAttention) and _reads_pool(modules, name)
    ]
    named.sort(key=lambda pair: int(pair[1].layer_id))
    layers = [module for _, module in named]
    slices = next(
        (_holder(modules, name).slices for name, _ in named if _is_sliced(modules, name)), None
    )
    config = model_runner.model_config.hf_config
    pool = model_runner.token_to_kv_pool
    reason = (
        refuse_model(config, pool, layers)
        or refuse_kv_scales(layers, _backends(model_runner))
        or refuse_quantised_layers(model_runner.model, model_runner.dtype)
    )
    if reason is not None:
        raise UnsupportedModelError(reason)
    rotations = read_rotations(
        config, model_runner.model, [_attention_of(modules, name) for name, _ in named]
    )
    by_layer = tuple(one.spec for one in rotations)
    differ = len({id(one) for one in by_layer}) > 1
    fingerprint = fingerprint_weights(model_runner.model)
    first = layers[0]
    text = getattr(config, "text_config", None) or config
    return ModelFacts(
        layers=tuple(layers),
        num_q_heads=int(first.tp_q_head_num),
        num_kv_heads=int(first.tp_k_head_num),
        head_dim=int(first.qk_head_dim),
        scaling=float(first.scaling),
        rotary=by_layer[0],
        rotary_by_layer=by_layer if differ else (),
        layout=layout_of_pool(pool),
        fingerprint=fingerprint,
        context_fields={
            "model_fingerprint": fingerprint,
            "dtype": str(model_runner.dtype).removeprefix("torch."),
            "kv_dtype": str(pool.dtype).removeprefix("torch."),
            "rope": canonical_json(
                {"layers": [one.identity for one in rotations]} if differ else rotations[0].identity
            ),
            "settings": describe_settings(
                config,
                model_runner.server_args,
                model_runner.prefill_attention_backend_str,
                slices,
            ),
            "tp_rank": tp_rank,
            "tp_size": tp_size,
        },
        slices=slices,
        qkv_share=_qkv_share(text, first),
        model_path=str(model_runner.model_config.model_path),
    )


def _holder(modules: dict[str, Any], name: str) -> Any:
    return modules[name.rpartition(".")[0]]


def _is_sliced(modules: dict[str, Any], name: str) -> bool:
    return isinstance(getattr(_holder(modules, name), "slices", None), LatentSlices)


def _attention_of(modules: dict[str, Any], name: str) -> Any:
    """What holds a layer's ``RadixAttention`` and its rotation; one module further out where latents are sliced."""
    outer = name.rpartition(".")[0]
    return _holder(modules, outer if _is_sliced(modules, name) else name)


def _reads_pool(modules: dict[str, Any], name: str) -> bool:
    """Whether an attention layer is the one of its module that a prompt is attended with; latent attention has others."""
    if _is_sliced(modules, name):
        return _holder(modules, name).whole is modules[name]
    absorbed = getattr(_holder(modules, name), "attn_mqa", None)
    return absorbed is None or absorbed is modules[name]


def _qkv_share(config: Any, layer: Any) -> float:
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None):
        return latent_qkv_share(
            hidden,
            heads,
            nope_dim=int(config.qk_nope_head_dim),
            rope_dim=int(config.qk_rope_head_dim),
            value_dim=int(config.v_head_dim),
            latent=int(config.kv_lora_rank),
            q_latent=int(config.q_lora_rank or 0),
            intermediate_size=int(config.intermediate_size),
        )
    kv_heads, size = int(config.num_key_value_heads), int(layer.qk_head_dim)
    return qkv_share(hidden, heads, kv_heads, size, int(config.intermediate_size))


def _backends(model_runner: Any) -> tuple[str, str]:
    """Attention backends that prefill and decode."""
    return (
        model_runner.prefill_attention_backend_str,
        model_runner.decode_attention_backend_str,
    )
