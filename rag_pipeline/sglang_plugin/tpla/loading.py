"""After loading: every MLA layer gets the basis, attention over slices, and the pool gets the slice's width."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_hooks, add_targets
from rag_pipeline.sglang_plugin.tpla.choice import TPLA, chosen_basis, statistics_file

__all__ = ["TARGETS", "register"]

logger = logging.getLogger(__name__)
_SRT = "sglang.srt."
_LOAD = HookTarget(
    path=f"{_SRT}model_executor.model_runner.ModelRunner.load_model",
    kind="after",
    why="TPLA: weights of MLA layers get the basis before the KV pool is made",
)
_USED = (
    HookTarget(
        path=f"{_SRT}models.deepseek_v2.DeepseekV2AttentionMLA",
        kind="uses",
        why="TPLA: names what is exchanged in an MLA layer: weights around the latent, and its attention",
        attributes=(
            *("kv_a_layernorm", "kv_b_proj", "w_kc", "w_vc", "attn_mqa", "has_fused_proj"),
            *("fused_qkv_a_proj_with_mqa", "kv_a_proj_with_mqa", "q_lora_rank", "kv_lora_rank"),
            *("use_dsa", "use_deep_gemm_bmm", "layer_id"),
        ),
    ),
    HookTarget(
        path=f"{_SRT}configs.model_config.ModelConfig",
        kind="uses",
        why="TPLA: the pool is made, and sized, by its width of a latent",
        attributes=("kv_lora_rank",),
    ),
    HookTarget(
        path=f"{_SRT}model_executor.model_runner.ModelRunner",
        kind="uses",
        why="TPLA: which runners hold latents, and where",
        attributes=("device", "is_draft_worker"),
    ),
    HookTarget(
        path=f"{_SRT}model_executor.forward_context.get_attn_backend",
        kind="uses",
        why="TPLA: slots of the requests of a prefill",
    ),
    HookTarget(
        path=f"{_SRT}layers.radix_attention.RadixAttention",
        kind="uses",
        why="TPLA: attention of all heads over a slice of the latent",
        params=("num_heads", "head_dim", "scaling", "num_kv_heads", "layer_id", "v_head_dim"),
    ),
    HookTarget(
        path=f"{_SRT}mem_cache.memory_pool.MLATokenToKVPool",
        kind="uses",
        why="TPLA: the pool of the slice's width, made with ModelConfig.kv_lora_rank",
        params=("kv_lora_rank", "qk_rope_head_dim"),
        attributes=("set_kv_buffer", "get_key_buffer"),
    ),
    HookTarget(
        path=f"{_SRT}distributed.parallel_state.get_attn_tp_group",
        kind="uses",
        why="TPLA: the ranks that hold the slices",
    ),
    HookTarget(
        path=f"{_SRT}distributed.parallel_state.GroupCoordinator",
        kind="uses",
        why="TPLA: gathers queries, what was read, and cached slices; one basis for all ranks",
        attributes=("all_gather", "broadcast", "rank_in_group", "world_size"),
    ),
    HookTarget(
        path=f"{_SRT}model_executor.model_runner_components.weight_updater._unsupported_derived_weight_cache_error",
        kind="uses",
        why="TPLA: reads _derived_weight_cache_error, by which a model refuses new weights",
        params=("model",),
    ),
)
TARGETS = (_LOAD, *_USED)
"""Rows of the hook table; in force where the environment asks for slices."""

_NO_UPDATE = (
    f"weights cannot be changed while {TPLA} slices the model's latents: they are in another basis than a checkpoint's; "
    "start the engine with the new weights"
)


def register() -> None:
    """Add the hook where the environment asks for slices; called by the plugin's entry point."""
    if chosen_basis() is None:
        return
    add_hooks([(_LOAD, _after_load)])
    add_targets(_USED)


def _after_load(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    basis = chosen_basis()
    if basis is None or runner.is_draft_worker:
        return
    layers = _latent_layers(runner.model)
    reason = _refusal(runner, layers)
    if reason is not None:
        raise EngineError(
            f"{TPLA}={basis} does not work with {reason}; start without it, or change that."
        )
    _slice(runner, layers, basis)


def _latent_layers(model: torch.nn.Module) -> list[Any]:
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

    return [module for module in model.modules() if isinstance(module, DeepseekV2AttentionMLA)]


def _refusal(runner: Any, layers: Sequence[Any]) -> str | None:
    """What keeps the latents from being sliced, in one line; None for nothing."""
    from rag_pipeline.sglang_plugin.cpu.backend_name import ATTENTION_BACKEND

    args = runner.server_args
    if not layers or not runner.use_mla_backend:
        return f"{runner.model_config.model_path}, which has no multi-head latent attention (MLA)"
    # None where nobody chose one: the platform's own, which on a CPU is ours.
    own = ATTENTION_BACKEND if runner.device == "cpu" else runner.device
    for part in (args.prefill_attention_backend, args.decode_attention_backend):
        named = part or args.attention_backend or own
        if named != ATTENTION_BACKEND:
            return f"attention by {named!r}; it is served by {ATTENTION_BACKEND!r} only, on a CPU"
    for name, off in (
        ("pp_size", 1),
        ("dp_size", 1),
        ("dcp_size", 1),
        ("attn_cp_size", 1),
        ("speculative_algorithm", None),
        ("enable_hierarchical_cache", False),
        ("enable_lora", None),
        ("disaggregation_mode", "null"),
    ):
        value = getattr(args, name, off)
        if value not in (off, None, False):
            return f"{name}={value!r}"
    if args.tp_size < 2:
        return "one rank: there is nothing to slice over; give tp_size 2 or more"
    for mla in layers:
        if mla.kv_lora_rank % args.tp_size:
            return f"tp_size {args.tp_size}: latents of {mla.kv_lora_rank} cannot be cut into so many equal slices"
        weights = (_down_proj(mla).weight, mla.kv_b_proj.weight, mla.w_kc, mla.w_vc)
        if mla.use_dsa or mla.use_deep_gemm_bmm or not all(w.is_floating_point() and w.element_size() > 1 for w in weights):  # fmt: skip
            return f"layer {mla.layer_id}: its latent attention is sparse or quantised"
        if getattr(_down_proj(mla), "bias", None) is not None:
            return f"layer {mla.layer_id}: its latent projection has a bias"
    return None


def _down_proj(mla: Any) -> Any:
    return mla.fused_qkv_a_proj_with_mqa if mla.has_fused_proj else mla.kv_a_proj_with_mqa


def _slice(runner: Any, layers: Sequence[Any], basis: str) -> None:
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    from rag_kernels.latent import LatentWeights, create_basis
    from rag_pipeline.sglang_plugin.tpla.attention import SlicedLatentAttention

    group = get_attn_tp_group()
    dims = [mla.kv_lora_rank for mla in layers]
    statistics = _statistics(Path(runner.model_config.model_path), dims, basis)
    with torch.no_grad():
        for number, mla in enumerate(layers):
            dim = mla.kv_lora_rank
            first = mla.q_lora_rank or 0
            down = _down_proj(mla).weight[first : first + dim]
            weights = LatentWeights(
                down_DX=down,
                gamma_D=mla.kv_a_layernorm.weight,
                w_kc_HND=mla.w_kc,
                w_vc_HDV=mla.w_vc,
            ).folded()
            own = None if statistics is None else statistics[number]
            turned = weights.rotated(
                _shared_basis(group, create_basis(basis, dim, own, seed=mla.layer_id))
            )
            down.copy_(turned.down_DX)
            mla.kv_a_layernorm.weight.copy_(turned.gamma_D)
            mla.w_kc.copy_(turned.w_kc_HND)
            mla.w_vc.copy_(turned.w_vc_HDV)
            # Read by no form that is computed here; kept the same weights all the same.
            up = torch.cat([turned.w_kc_HND, turned.w_vc_HDV.mT], 1).flatten(0, 1)
            mla.kv_b_proj.weight.copy_(up)
            mla.attn_mqa = SlicedLatentAttention(mla.attn_mqa, group, dim)
    runner.model._derived_weight_cache_error = _NO_UPDATE
    # The pool is made of this, and sized by it.
    runner.model_config.kv_lora_rank = dims[0] // group.world_size
    logger.info(
        "TPLA: %d layers in the basis %r, slice %d of %d: %d of %d latent numbers a token",
        *(len(layers), basis, group.rank_in_group + 1, group.world_size),
        *(runner.model_config.kv_lora_rank, dims[0]),
    )


def _shared_basis(group: Any, basis_DD: Tensor) -> Tensor:
    """Basis of the first rank, on all of them.

    Eigenvectors of the same matrix may have other signs, or be others where energies are equal, on another number of
    threads. Slices of two bases are slices of no latent.
    """
    return torch.as_tensor(group.broadcast(basis_DD.contiguous(), src=0))


def _statistics(folder: Path, dims: list[int], basis: str) -> Sequence[Any] | None:
    if basis not in ("pca", "output"):
        return None
    from rag_kernels.latent import ModelStatistics
    from rag_pipeline.models import fingerprint_checkpoint

    fingerprint = fingerprint_checkpoint(folder)
    file = statistics_file(fingerprint)
    if not file.is_file():
        raise EngineError(
            f"{TPLA}={basis} needs statistics of the model, and there is no {file}; run `rag-pipeline tpla calibrate "
            f"--model {folder}`, or take the basis 'identity'."
        )
    try:
        found = ModelStatistics.read(file)
        found.check(fingerprint, dims)
    except ValueError as error:
        raise EngineError(f"{TPLA}={basis}: {error}") from error
    return found.layers
