"""Frequencies from a Hugging Face configuration, and which encodings are refused."""

from __future__ import annotations

from typing import Any

from rag_kernels.errors import RotaryUnsupportedError
from rag_kernels.rotary import RotarySpec

_ROTATABLE = ("default", "linear", "llama3", "yarn")
_ALIASES = {"deepseek_yarn": "yarn"}
"""Other names of the same frequencies: SGLang calls YaRN so where the model scales its attention by a rule of its own."""
_REASONS = {
    "dynamic": "dynamic NTK scaling changes the frequencies with the length of the prompt",
    "longrope": "longrope switches between two sets of frequencies with the length of the prompt",
    "su": "longrope switches between two sets of frequencies with the length of the prompt",
}


def rotary_spec_from_config(hf_config: Any, is_neox_style: bool = True) -> RotarySpec:
    """Rotation of a model from its configuration, as transformers computes it.

    Parameters
    ----------
    hf_config : transformers.PretrainedConfig
        The text model's configuration.
    is_neox_style : bool
        Pairing of the dimensions; True for Llama, Qwen2, Qwen3 and Mistral in Hugging Face layout.

    Raises
    ------
    RotaryUnsupportedError
        No rotary embedding, or one whose frequencies are not the same for every prompt.
    """
    import torch

    config = getattr(hf_config, "text_config", None) or hf_config
    params = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta = params.get("rope_theta") or getattr(config, "rope_theta", None)
    if theta is None:
        raise RotaryUnsupportedError(
            f"model type {getattr(config, 'model_type', '?')!r} has no rope_theta: its positions are not rotary, "
            "so cached keys cannot be moved; chunk reuse stays off for it."
        )
    kind = params.get("rope_type") or params.get("type") or "default"
    kind = _ALIASES.get(kind, kind)
    if kind not in _ROTATABLE:
        reason = _REASONS.get(
            kind, "it is not known to rotate every key by position times a fixed frequency"
        )
        raise RotaryUnsupportedError(
            f"rope type {kind!r} is not supported: {reason}; allowed: {', '.join(_ROTATABLE)}. "
            "Chunk reuse stays off for this model."
        )
    # Of latent attention (MLA) only a part of each key is rotated, and that whole.
    head_dim = (
        getattr(config, "qk_rope_head_dim", None)
        or getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )
    partial = (
        params.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    )
    dim = int(head_dim * partial)
    if kind == "default":
        exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        inv_freq = 1.0 / (float(theta) ** exponent)
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return RotarySpec.from_inv_freq(inv_freq, dim, is_neox_style)
