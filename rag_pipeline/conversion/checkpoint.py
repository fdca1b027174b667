"""A stock DeepSeek-V2 checkpoint: configuration, safetensors, tokenizer.

Two things of DeepSeek-V2 stand in the way of an exact copy, and are made harmless by scaling alone:

- ``kv_a_layernorm`` would normalise latents. They are written so small that the norm's ``eps`` decides, and its scale
  gives their size back: the norm multiplies by a constant.
- transformers has that ``eps`` fixed at 1e-6 and SGLang takes the model's, so the model's is 1e-6. Where the original
  has another one, the whole residual stream is scaled, by which every norm computes as before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rag_pipeline.conversion.config import ConversionConfig
from rag_pipeline.conversion.layers import LatentLayer
from rag_pipeline.conversion.source import LAYER_NAMES, SourceShape, SourceWeights
from rag_pipeline.whole_file import write_whole
from retrievers.durable import sync_tree

EPS = 1e-6
"""In the root of every norm."""
SMALL = 2.0**-24
"""Size of a stored latent before its norm: its square is 3e-15, against an ``eps`` of 1e-6."""
_SHARD_BYTES = 2 << 30
_COPIED = ("token", "vocab", "merges", "special_tokens")
_COPIED_NAMES = ("generation_config.json", "chat_template.jinja", "LICENSE", "LICENSE.txt")


def checkpoint_config(shape: SourceShape, config: ConversionConfig) -> dict[str, Any]:
    """Contents of ``config.json``; no layer has experts, but both loaders want their fields."""
    heads = config.heads(shape)
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "dtype": config.written_dtype(shape),
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": None,
        "kv_lora_rank": config.latent,
        "qk_rope_head_dim": config.rope,
        "qk_nope_head_dim": shape.head_dim,
        "v_head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "rope_theta": shape.theta,
        "max_position_embeddings": shape.context,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        **shape.token_ids,
        # No layer has experts. SGLang reads fields that transformers does not know.
        "first_k_dense_replace": shape.layers,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 64,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
    }


def attention_tensors(layer: LatentLayer, heads: int, residual: float) -> dict[str, Tensor]:
    """Weights of ``self_attn`` by their names, fp32.

    Parameters
    ----------
    layer : LatentLayer
        The latent form.
    heads : int
        Heads to write; those that the layer does not have are zeros.
    residual : float
        Scale of the residual stream.
    """
    rope, missing = len(layer.k_rope_RD), heads - len(layer.q_HED)
    # DeepSeek-V2 has real and imaginary parts of a frequency side by side.
    paired = torch.arange(rope).view(2, -1).T.flatten()

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]).flatten(0, 1)

    width = layer.v_up_HEC.shape[1]
    return {
        "q_proj": padded(torch.cat([layer.q_HED, layer.q_rope_HRD[:, paired]], 1)),
        "kv_a_proj_with_mqa": torch.cat([layer.latent_CD * SMALL, layer.k_rope_RD[paired]]),
        "kv_a_layernorm": torch.full((len(layer.latent_CD),), EPS**0.5 / SMALL),
        "kv_b_proj": padded(torch.cat([layer.k_up_HEC, layer.v_up_HEC], 1)),
        "o_proj": torch.cat([layer.o, layer.o.new_zeros(len(layer.o), missing * width)], 1)
        * residual,
    }


def tensors_of(
    weights: SourceWeights,
    shape: SourceShape,
    config: ConversionConfig,
    layer_of: Callable[[int], LatentLayer],
) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights of the checkpoint by name, fp32, a layer at a time."""
    residual = (EPS / shape.eps) ** 0.5
    norm = weights.tensor("model.norm.weight")
    yield "model.embed_tokens.weight", weights.embedding() * residual
    if shape.tied:  # The output's weights are scaled with the embedding's.
        norm = norm / residual
    else:
        yield "lm_head.weight", weights.tensor("lm_head.weight")
    yield "model.norm.weight", norm
    for index in range(shape.layers):
        place = f"model.layers.{index}"
        original = weights.layer(index)
        for field in ("gate", "up", "down", "attention_norm", "network_norm"):
            value: Tensor = getattr(original, field)
            yield (
                f"{place}.{LAYER_NAMES[field]}.weight",
                value * residual if field == "down" else value,
            )
        attention = attention_tensors(layer_of(index), config.heads(shape), residual)
        for name, value in attention.items():
            yield f"{place}.self_attn.{name}.weight", value


def write_checkpoint(
    folder: Path,
    weights: SourceWeights,
    shape: SourceShape,
    config: ConversionConfig,
    layer_of: Callable[[int], LatentLayer],
) -> None:
    """Write a checkpoint, and sync it.

    Parameters
    ----------
    folder : Path
        New; its parent exists.
    weights, shape : SourceWeights, SourceShape
        The original.
    config : ConversionConfig
        Sizes and type.
    layer_of : callable
        Latent form of a layer by number.

    Raises
    ------
    OSError
        Where the disk refuses; what was written stays.
    """
    folder.mkdir()
    dtype = getattr(torch, config.written_dtype(shape))
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        from safetensors.torch import save_file

        save_file(held, folder / f"shard-{len(shards)}", {"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, value in tensors_of(weights, shape, config, layer_of):
        held[name] = value.to(dtype).contiguous()
        weight = held[name].numel() * held[name].element_size()
        size, total = size + weight, total + weight
        if size >= _SHARD_BYTES:
            flush()
            size = 0
    if held:
        flush()
    _name_shards(folder, shards, total)
    for file in weights.folder.iterdir():
        if any(part in file.name for part in _COPIED) or file.name in _COPIED_NAMES:
            shutil.copyfile(file, folder / file.name)
    text = json.dumps(checkpoint_config(shape, config), indent=2) + "\n"
    write_whole(folder / "config.json", text)
    sync_tree(folder)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give files the names that loaders look for, and write an index where there are several."""
    homes: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        )
        path = folder / f"shard-{number}"
        path.chmod(0o644)  # safetensors gives 0o600; weights are no secret
        path.rename(folder / file)
        homes |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
