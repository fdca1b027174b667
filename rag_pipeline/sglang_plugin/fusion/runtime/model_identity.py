"""What makes chunk KV of one engine other than that of another: the weights, the configuration, the way it computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from rag_pipeline.sglang_plugin.fusion.runtime.quantised import quantiser

if TYPE_CHECKING:
    from rag_pipeline.sglang_plugin.tpla.slices import LatentSlices

_NO_MATTER = frozenset(
    {
        "_name_or_path",
        "_attn_implementation_autoset",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        # SGLang's own, of its settings: how long a prompt may be (the rope table counts by itself), where weights lie.
        "context_len",
        "ple_offload_backend",
        "ple_offload_dir",
        "ple_offload_embedding",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of a Hugging Face configuration that no key or value depends on; the dtype in use is told apart elsewhere."""
_SETTINGS = (
    "quantization",
    "kv_cache_dtype",
    "torchao_config",
    "model_impl",
    "json_model_override_args",
)
"""Settings of the engine that change keys or values on purpose, not by rounding alone."""
_PIECE_BYTES = 64 << 20


def fingerprint_weights(model: torch.nn.Module) -> str:
    """Hash of names, shapes, types and every byte of the loaded weights, scales of quantised ones among them.

    The tensors as loaded, and not file names, tell apart checkpoints that share a name and merged adapters. All
    bytes are read, about 2 GB/s: samples miss a head, a column or a layer that was changed between them.
    """
    digest = xxhash.xxh3_128()
    for name, number in sorted(_loose_scales(model).items()):
        digest.update(f"{name}={number!r}|".encode())
    for name, tensor in sorted((model.state_dict() | _loose_tensors(model)).items()):
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in flat.split(_PIECE_BYTES):
            digest.update(memoryview(piece.cpu().numpy()))
    return digest.hexdigest()


def _loose_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Tensors that ``state_dict`` does not know: some quantisation methods keep scales as plain attributes."""
    return {
        f"{name}.{key}": value
        for name, key, value in _attributes(model)
        if isinstance(value, Tensor) and "workspace" not in key
    }


def _loose_scales(model: torch.nn.Module) -> dict[str, float]:
    """Scales that a quantisation method took out of its tensors, as plain numbers."""
    return {
        f"{name}.{key}": value
        for name, key, value in _attributes(model)
        if isinstance(value, float) and "scale" in key
    }


def _attributes(model: torch.nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Plain attributes of quantised layers and of what quantises them, as place, name and value."""
    for name, module in model.named_modules():
        method = quantiser(module)
        if method is None:
            continue
        for part, holder in (
            ("", module),
            (".method", method),
            (".scheme", getattr(module, "scheme", None)),
        ):
            for key, value in getattr(holder, "__dict__", {}).items():
                yield name + part, key, value
        for key in module._non_persistent_buffers_set:
            yield name, key, module._buffers[key]


def describe_settings(
    hf_config: Any, settings: Any, attention: str, slices: LatentSlices | None = None
) -> str:
    """Digest of everything in a model's configuration and an engine's settings that may change chunk KV.

    Parameters
    ----------
    hf_config : transformers.PretrainedConfig
        As in effect, overrides applied. Every field counts but a few that are known not to matter: one that
        nobody has heard of is a miss, never KV of another model.
    settings : sglang.srt.server_args.ServerArgs
        Of the engine; of these a few count.
    attention : str
        Attention backend that prefills.
    slices : LatentSlices, optional
        Where this rank keeps a part of each latent. The weights do not always tell: in the checkpoint's own basis, with
        a norm of equal weights, they are those of an engine that keeps whole latents.
    """
    said: dict[str, Any] = {
        "config": _without(hf_config.to_dict()),
        "attention": attention,
        "engine": {name: str(getattr(settings, name, None)) for name in _SETTINGS},
    }
    if slices is not None:
        said["latent"] = [slices.own.start, slices.own.stop, slices.dim]
    text = json.dumps(said, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"ragkv-settings").hexdigest()


def _without(value: Any) -> Any:
    """Nested configurations too, such as that of the text part."""
    if not isinstance(value, dict):
        return value
    return {str(key): _without(item) for key, item in value.items() if key not in _NO_MATTER}
