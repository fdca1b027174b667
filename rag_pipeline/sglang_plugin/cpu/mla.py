"""Multi-head latent attention (DeepSeek-V2 and later) on a CPU without SGLang's own kernels.

The pool holds one latent and one rotated position part per token, for all heads (``MLATokenToKVPool``). Prefill and decode
read it in the absorbed form: ``w_kc`` is folded into the queries, ``w_vc`` into the output, and attention has one KV head
whose keys are ``[latent, position part]`` and whose values are the latent.
"""

from __future__ import annotations

from typing import Any

import torch

from rag_pipeline.sglang_plugin.cpu.backend_name import ATTENTION_BACKEND
from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_targets, verify_targets

_ROPE_PARAMS = (
    *("head_size", "rotary_dim", "max_position", "base", "is_neox_style", "rope_scaling"),
    *("dtype", "partial_rotary_factor", "device"),
)
_HANDLER = "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry"
ROPE_TARGETS = (
    HookTarget(
        path="sglang.srt.layers.rotary_embedding.factory.get_rope_cpu",
        kind="assigned",
        why="rotation of MLA models without YaRN, which it refuses",
        params=_ROPE_PARAMS,
    ),
    HookTarget(
        path="sglang.srt.layers.rotary_embedding.factory.get_rope",
        kind="uses",
        why="what makes the rotation then",
        params=_ROPE_PARAMS[:8],
    ),
)
FORM_TARGETS = (
    HookTarget(
        path=f"{_HANDLER}.register",
        kind="uses",
        why="MLA layers take the absorbed form with our backend, in prefill too",
        params=("backend_name", "handler_func"),
    ),
    HookTarget(
        path="sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods.AttnForwardMethod",
        kind="uses",
        why="names the absorbed form",
        attributes=("MLA",),
    ),
)


def rotate_without_yarn() -> None:
    """Let MLA models without ``rope_scaling`` have SGLang's plain rotation; others keep its YaRN for CPUs. Idempotent."""
    from sglang.srt.layers.rotary_embedding import factory

    add_targets(ROPE_TARGETS)
    verify_targets(ROPE_TARGETS)
    original = factory.get_rope_cpu
    if getattr(original, "serves_plain", False):
        return

    def get_rope_cpu(
        head_size: int,
        rotary_dim: int,
        max_position: int,
        base: int,
        is_neox_style: bool = True,
        rope_scaling: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        partial_rotary_factor: float = 1.0,
        device: str | None = None,
    ) -> Any:
        sizes = (head_size, rotary_dim, max_position, base, is_neox_style)
        if rope_scaling is None:
            return factory.get_rope(*sizes, None, dtype, partial_rotary_factor)
        return original(*sizes, rope_scaling, dtype, partial_rotary_factor, device)

    get_rope_cpu.serves_plain = True  # type: ignore[attr-defined]
    factory.get_rope_cpu = get_rope_cpu


def absorb_always() -> None:
    """Have MLA layers computed in the absorbed form. SGLang sends a prefill without prefix elsewhere for a backend that it does not know."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
    )
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    add_targets(FORM_TARGETS)
    verify_targets(FORM_TARGETS)
    AttentionBackendRegistry.register(ATTENTION_BACKEND, lambda layer, batch: AttnForwardMethod.MLA)
