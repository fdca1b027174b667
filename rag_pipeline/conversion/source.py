"""The model that is converted: its shape, checked against what the latent form can express, and its weights layer by layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rag_pipeline.conversion.config import ConversionError

_FAMILIES = ("llama", "mistral")
"""Model types whose layers are RMSNorm, grouped-query attention without biases, and a SwiGLU network."""
_REASONS = {
    "qwen2": "its attention has biases, for which DeepSeek-V2 has no place",
    "qwen3": "its queries and keys are normalised per head, for which DeepSeek-V2 has no place",
    "gemma2": "its layers have windows and norms of their own",
    "gemma3_text": "its layers have windows and norms of their own",
    "deepseek_v2": "it has multi-head latent attention already",
    "deepseek_v3": "it has multi-head latent attention already",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceShape:
    """Sizes of a grouped-query model.

    Parameters
    ----------
    layers, hidden, intermediate, vocabulary : int
        Numbers of layers, and widths.
    heads, kv_heads, head_dim : int
        Query heads, key and value heads, numbers in each.
    eps : float
        In the root of its norms.
    theta : float
        Base of RoPE's frequencies.
    tied : bool
        Whether output and embedding share their weights.
    dtype : str
        Of its weights, such as ``bfloat16``.
    context : int
        Longest prompt, tokens.
    token_ids : dict
        Fields ``bos_token_id``, ``eos_token_id``, ``pad_token_id`` as they stand in the configuration.
    """

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    tied: bool
    dtype: str
    context: int
    token_ids: dict[str, Any]

    @property
    def kv_width(self) -> int:
        """Numbers in the keys of one token, and in its values."""
        return self.kv_heads * self.head_dim

    @property
    def frequencies(self) -> Tensor:
        """Angles per token of RoPE, fp64 ``(head_dim / 2,)``."""
        half = self.head_dim // 2
        return self.theta ** (-torch.arange(half, dtype=torch.float64) / half)


def read_shape(folder: Path) -> SourceShape:
    """Read a model's shape.

    Raises
    ------
    ConversionError
        Another family, or a member of it that a stock DeepSeek-V2 checkpoint cannot express; names it.
    """
    try:
        given = json.loads((folder / "config.json").read_text("utf-8"))
        kind = str(given["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{folder} has no readable config.json ({error})") from error
    _check_family(folder, kind)
    _refuse_variants(folder, given)
    rope = given.get("rope_parameters") or given
    heads, hidden = int(given["num_attention_heads"]), int(given["hidden_size"])
    return SourceShape(
        layers=int(given["num_hidden_layers"]),
        hidden=hidden,
        intermediate=int(given["intermediate_size"]),
        vocabulary=int(given["vocab_size"]),
        heads=heads,
        kv_heads=int(given.get("num_key_value_heads") or heads),
        head_dim=int(given.get("head_dim") or hidden // heads),
        eps=float(given.get("rms_norm_eps", 1e-6)),
        theta=float(rope.get("rope_theta", given.get("rope_theta", 10000.0))),
        tied=bool(given.get("tie_word_embeddings", False)),
        dtype=str(given.get("dtype") or given.get("torch_dtype") or "float32"),
        context=int(given.get("max_position_embeddings", 2048)),
        token_ids={
            name: given.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
    )


def check_gguf(file: Path) -> None:
    """Refuse a GGUF file by the family that its header names, before its weights are unpacked.

    Raises
    ------
    ConversionError
        Another family; names it.
    ModelError
        No GGUF file, or a damaged one.
    """
    from rag_pipeline.models.gguf_file import read_gguf

    kind = read_gguf(file).architecture
    _check_family(file, "deepseek_v2" if kind == "deepseek2" else kind)


def _check_family(place: Path, kind: str) -> None:
    if kind not in _FAMILIES:
        reason = _REASONS.get(kind, "it is not made of the layers that the conversion knows")
        raise ConversionError(
            f"{place} is of family {kind} and cannot be converted: {reason}; allowed: {', '.join(_FAMILIES)}"
        )


def _refuse_variants(folder: Path, given: dict[str, Any]) -> None:
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    reasons = {
        f"its RoPE is of type {kind}": kind != "default",
        "only a part of each head has a position": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "its attention has biases": bool(given.get("attention_bias")),
        "its network has biases": bool(given.get("mlp_bias")),
        "its layers have a window": bool(given.get("sliding_window")),
        f"its activation is {given.get('hidden_act')}": given.get("hidden_act", "silu") != "silu",
        "its weights are quantised": "quantization_config" in given,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConversionError(
                f"{folder} ({given['model_type']}) cannot be converted: {reason}; DeepSeek-V2 has no place for that"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One layer of the original, fp32; matrices are ``(out, in)``.

    Parameters
    ----------
    q, k, v, o : Tensor
        Projections of attention.
    gate, up, down : Tensor
        Of the network.
    attention_norm, network_norm : Tensor
        Scales of the norms before either, ``(hidden,)``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    attention_norm: Tensor
    network_norm: Tensor


LAYER_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "network_norm": "post_attention_layernorm",
}


class SourceWeights:
    """Tensors of a checkpoint, read when they are asked for.

    Parameters
    ----------
    folder : Path
        In Hugging Face format, with safetensors.

    Raises
    ------
    ConversionError
        No safetensors file, or one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._home: dict[str, Path] = {}
        try:
            for file in sorted(folder.glob("*.safetensors")):
                with safe_open(file, framework="pt") as tensors:
                    self._home |= dict.fromkeys(tensors.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"the weights in {folder} cannot be read: {error}") from error
        if not self._home:
            raise ConversionError(
                f"{folder} holds no *.safetensors; the conversion reads no others"
            )

    def tensor(self, name: str) -> Tensor:
        """Read a tensor as fp32.

        Raises
        ------
        ConversionError
            The checkpoint has none of that name.
        """
        if name not in self._home:
            raise ConversionError(f"{self.folder} has no weight {name}; it is incomplete")
        with safe_open(self._home[name], framework="pt") as tensors:
            return tensors.get_tensor(name).float()

    def layer(self, index: int) -> LayerWeights:
        """Read a layer."""
        return LayerWeights(
            **{
                field: self.tensor(f"model.layers.{index}.{name}.weight")
                for field, name in LAYER_NAMES.items()
            }
        )

    def embedding(self) -> Tensor:
        """Read the embedding, ``(vocabulary, hidden)``."""
        return self.tensor("model.embed_tokens.weight")
