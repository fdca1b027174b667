"""Calibrate a model: its own prefill, layer by layer, with dense attention; nothing is kept between layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rag_eval.command import Progress
from rag_eval.errors import EvalError
from rag_kernels.sparse.sale.calibration import Calibration

_NAME = "rag_eval_calibration"

SeeLayer = Callable[[int, Tensor, Tensor, Tensor, float], object]
"""``see(layer, q_RHD, k_RND, v_RND, scale)``: rotated queries and keys, and values, of a whole prompt."""


def load_model(folder: Path, see: SeeLayer) -> Any:
    """Load a model whose attention is dense and shows what it is given.

    Parameters
    ----------
    folder : Path
        In Hugging Face format.
    see : SeeLayer
        Called per layer of each forward pass, before the layer's own attention.

    Raises
    ------
    EvalError
        The model caps its logits or has a window, or transformers does not call its attention by name.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any
    ) -> Any:
        if more.get("softcap") or more.get("sliding_window"):
            raise EvalError(
                "the model caps its logits or has a window; SALE reads everything there"
            )
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        scale = more.get("scaling")
        see(module.layer_idx, q, k, v, float(scale if scale is not None else q.shape[-1] ** -0.5))
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    AttentionInterface.register(_NAME, attention)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=_NAME
    ).eval()


def run_prompt(model: Any, ids: Sequence[int]) -> None:
    """Prefill one prompt, whole and without cached keys."""
    with torch.no_grad():
        model(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1)


def calibrate(
    folder: Path, prompts: Sequence[Sequence[int]], calibration: Calibration, progress: Progress
) -> dict[str, Any]:
    """Show every prompt to a calibration.

    Returns
    -------
    dict
        Number of layers seen and the largest error per row that was left.
    """
    worst: list[float] = []

    def see(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        error = calibration.add(layer, q, k, v, scale)
        worst.append(float(error.max()))
        progress(f"layer {layer}: largest error per row {worst[-1]:.3f}")

    model = load_model(folder, see)
    for number, ids in enumerate(prompts, 1):
        progress(f"prompt {number} of {len(prompts)}: {len(ids)} tokens")
        run_prompt(model, ids)
    if not worst:
        raise EvalError(
            f"no attention layer of {folder} was seen; transformers runs it another way"
        )
    return {"layers": len(worst) // len(prompts), "largest_error": max(worst)}
