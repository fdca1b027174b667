"""Which models and engine settings fusion works with; everything else is refused with one reason.

A refusal is not an error: the engine keeps serving, by ordinary prefill.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from chunk_cache import ChunkCacheError, layout_of_pool

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "DeepseekV2ForCausalLM",
)
"""Tested families. They keep rotated keys and plain values of every layer in one paged pool, or position parts and latents.

Where there are experts, each row is routed by itself, so a pass over fewer rows routes them alike."""

_WHY_NOT = {
    "GptOssForCausalLM": "SGLang serves it on attention backends of GPUs only, so chunk KV beside attention sinks was "
    "never proven in an engine",
    "Gemma3ForConditionalGeneration": "its prompts may hold images, which attend both ways",
}
"""Families that were looked at, and what stands in the way."""

_KV_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuse_settings(server_args: Any) -> str | None:
    """Reason why fusion cannot work with these settings, or None.

    Parameters
    ----------
    server_args : sglang.srt.server_args.ServerArgs
        Settings of the engine; unknown ones are taken as unset.
    """

    def setting(name: str, default: Any = None) -> Any:
        return getattr(server_args, name, default)

    if setting("pp_size", 1) > 1:
        return (
            "pipeline parallelism (--pp-size): rows and positions are not passed between stages yet"
        )
    if setting("enable_dp_attention", False):
        return (
            "data-parallel attention (--enable-dp-attention): its ranks pad to a common row count"
        )
    if setting("speculative_algorithm") not in (None, "NGRAM"):
        return (
            f"speculative decoding by {setting('speculative_algorithm')}: its draft model prefills every prompt token "
            "or takes their hidden states, and fusion computes some; NGRAM works"
        )
    if setting("attn_cp_size", 1) > 1 or setting("dcp_size", 1) > 1:
        return "context parallelism: a rank holds only a part of a request's keys"
    if setting("disaggregation_mode", "null") not in ("null", None):
        return "disaggregated prefill: chunk KV is not part of the transfer yet"
    if setting("enable_two_batch_overlap", False):
        return "two-batch overlap: it splits a batch by raw token counts"
    if setting("enable_pdmux", False):
        return "PD multiplexing (--enable-pdmux): a forward computes some of the layers of a prompt"
    if setting("disable_radix_cache", False):
        return None
    if setting("enable_hierarchical_cache", False):
        return "hierarchical cache (--enable-hierarchical-cache): untested together with fusion"
    if setting("enable_lmcache", False):
        return "LMCache (--enable-lmcache): both would write the same slots"
    if setting("enable_unified_cache_external_linker", False):
        return "an external cache linker: it lengthens a request's prefix behind the match"
    return None


def refuse_tree(tree: Any) -> str | None:
    """Reason why fusion cannot work beside an engine's prefix cache, or None.

    What keeps fused KV from being published as exact is hooked into one class. Any other may publish through doors of
    its own, a subclass too.

    Parameters
    ----------
    tree : BasePrefixCache
        SGLang's, of the scheduler.
    """
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    if type(tree) is UnifiedRadixCache:
        return None
    return (
        f"prefix cache {type(tree).__name__}: only SGLang's own UnifiedRadixCache is kept free of fused KV; start "
        "without --radix-cache-backend, --enable-flexkv and --enable-lmcache"
    )


def refuse_model(hf_config: Any, pool: Any, layers: list[Any]) -> str | None:
    """Reason why the loaded model is refused, or None; the rotary embedding is judged elsewhere.

    Parameters
    ----------
    hf_config : transformers.PretrainedConfig
        The model's configuration.
    pool : object
        SGLang's KV pool of the model.
    layers : list
        Its ``RadixAttention`` modules.
    """
    names = getattr(hf_config, "architectures", None) or ["?"]
    if names[0] not in SUPPORTED_ARCHITECTURES:
        why = _WHY_NOT.get(names[0], "it is not tested")
        return f"architecture {names[0]}: {why}; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
    if hasattr(pool, "full_to_swa_index_mapping"):
        return (
            "a KV pool of its own for sliding-window layers, which forgets what is behind the window: start with "
            "--disable-hybrid-swa-memory"
        )
    try:
        layout = layout_of_pool(pool)
    except ChunkCacheError as error:
        return str(error)
    if pool.dtype not in _KV_DTYPES or pool.store_dtype != pool.dtype:
        return f"KV dtype {pool.dtype}: quantised KV is refused"
    if not layers:
        return "the model has no RadixAttention layer"
    if [layer.layer_id for layer in layers] != list(range(len(layers))):
        return "attention layers are not numbered 0, 1, 2, ...: not a plain decoder stack"
    for layer in layers:
        if layer.is_cross_attention or layer.attn_type.value != "decoder":
            return f"attention of layer {layer.layer_id} is not causal self-attention"
        if layer.logit_cap and layer.logit_capping_method != "tanh":
            return f"logits of layer {layer.layer_id} are capped by {layer.logit_capping_method!r}, not by tanh"
        if layer.scaling != layers[0].scaling:
            return f"layer {layer.layer_id} scales its logits by {layer.scaling}, layer 0 by {layers[0].scaling}"
        if layer.qk_head_dim != layer.v_head_dim and not layout.reads_rows:
            return f"layer {layer.layer_id} has keys and values of different size"
    return None


def refuse_beside(req: Any) -> str | None:
    """Reason why no request of a batch can be fused if this one is in it, as a short label, or None.

    A fused pass has fewer rows than the batch that SGLang made. What SGLang prepares or slices by a request's
    position follows; this is the one list of what goes by the batch's original rows instead.
    """
    if req.lora_id is not None:
        return "lora"  # adapters are laid out in segments of rows
    if req.return_hidden_states or req.return_pooled_hidden_states:
        return "hidden_states"  # sliced by the rows that the scheduler counted
    if req.return_routed_experts or req.return_indexer_topk:
        return "routed_experts"
    if req.multi_item_delimiter_indices is not None:
        return "multi_item_scoring"  # positions of rows, and attention that is not causal
    if req.token_indices_to_pool is not None or req.decision_layout is not None:
        return "pooled_positions"
    if req.input_embeds is not None or req.positional_embed_overrides is not None:
        return "input_embeds"
    if req.token_type_ids:
        return "token_types"
    if req.multimodal_inputs is not None:
        return "multimodal"
    if req.is_dllm():
        return "diffusion_model"
    return None


def refuse_batch(reqs: Iterable[Any]) -> str:
    """Reason why nothing in a batch of these requests can be fused, as a short label; empty for none."""
    reasons = (refuse_beside(req) for req in reqs)
    return next((f"beside_{reason}" for reason in reasons if reason is not None), "")


def refuse_request(req: Any) -> str | None:
    """Reason why one request is prefilled as usual, as a short label for the counters, or None."""
    reason = refuse_beside(req)
    if reason is not None:
        return reason
    if req.session is not None:
        return "session"
    if req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids) - 1:
        return "input_logprobs"
    if req.beam_group is not None:
        return "beam_search"
    return None
