"""A DeepSeek-V2 of ``transformers`` whose attention is sliced over ranks that one process plays one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rag_eval.errors import EvalError
from rag_kernels.latent import (
    LatentRows,
    LatentWeights,
    exact_norm,
    gla_attention,
    sliced_norm,
    tpla_attention,
    unsliced_attention,
)

SeeLayer = Callable[[int, Tensor, Tensor], object]
"""``see(layer, q_nope_THN, latent_TD)``: queries without position, and latents behind the norm, of a batch."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SlicedLayer:
    """How one layer computes.

    Attributes
    ----------
    weights : LatentWeights
        Folded, in the basis of the variant.
    ranks : int
        Slices.
    grouped : bool
        Whether each rank computes its group of the heads only (GLA) instead of all of them.
    shares : tuple of float, optional
        Energy of the slices, where each rank norms by its own; None for the norm of the whole latent.
    logit_scales : tuple of float, optional
        Of the ranks' logits; ones if not given.
    """

    weights: LatentWeights
    ranks: int
    grouped: bool = False
    shares: tuple[float, ...] | None = None
    logit_scales: tuple[float, ...] | None = None


class LatentModel:
    """Perplexity of a text under slicing, by prompts that are prefilled and tokens that are decoded.

    Parameters
    ----------
    model : object
        A ``DeepseekV2ForCausalLM`` of transformers. Its attention modules are given other forwards.

    Raises
    ------
    EvalError
        Another architecture, or projections with a bias.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        _check(config)
        self.model = model.eval()
        self.config = config
        self._attentions: list[Any] = [layer.self_attn for layer in model.model.layers]
        self.weights = [_weights_of(module).folded() for module in self._attentions]

    @classmethod
    def load(cls, folder: Path, dtype: str = "float32") -> LatentModel:
        """Load weights in Hugging Face format, with a dtype of torch by name."""
        from transformers import AutoModelForCausalLM

        check_folder(folder)
        return cls(
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        )

    @property
    def dim(self) -> int:
        """Width of the latent."""
        return int(self.config.kv_lora_rank)

    def out_HVX(self, layer: int) -> Tensor:
        """Output projection of a layer by head, ``[H, V, X]``."""
        weight: Tensor = self._attentions[layer].o_proj.weight.detach()
        return weight.mT.reshape(self.config.num_attention_heads, self.config.v_head_dim, -1)

    def as_it_is(self) -> None:
        """Let all layers compute as transformers does."""
        for module in self._attentions:
            module.__dict__.pop("forward", None)

    def slice_layers(self, layers: Sequence[SlicedLayer], prompt: int) -> None:
        """Give all layers sliced attention.

        Parameters
        ----------
        layers : sequence of SlicedLayer
            In the order of the model.
        prompt : int
            First rows of every sequence, computed unsliced; their latents have the norm of the whole. 0 for none.
        """
        for module, layer in zip(self._attentions, layers, strict=True):
            module.forward = _SlicedForward(module, layer, prompt)

    def show_layers(self, see: SeeLayer) -> None:
        """Let all layers compute unsliced and show what they compute from."""
        for module, weights in zip(self._attentions, self.weights, strict=True):
            module.forward = _SlicedForward(module, SlicedLayer(weights=weights, ranks=1), 0, see)

    def losses(self, ids_BT: Tensor, scored: int) -> Tensor:
        """Negative log-probabilities of the last tokens of each sequence, fp32 ``[B, scored]``."""
        with torch.inference_mode():
            found = self.model(ids_BT, use_cache=False, logits_to_keep=scored + 1).logits
            logits = found[:, :-1].float()
            wanted = ids_BT[:, -scored:, None]
            return (logits.logsumexp(-1) - logits.gather(-1, wanted)[..., 0]).cpu()


def check_folder(folder: Path) -> None:
    """Refuse a model that :class:`LatentModel` would, before its weights are loaded."""
    from transformers import AutoConfig

    _check(AutoConfig.from_pretrained(folder))


def _check(config: Any) -> None:
    if config.model_type != "deepseek_v2":
        raise EvalError(
            f"the model is a {config.model_type!r}; TPLA is for latent attention in the form of "
            "DeepSeek-V2, into which `rag-pipeline convert mla` brings Llama and Mistral"
        )
    if config.attention_bias:
        raise EvalError(
            "the model's latent projection has a bias, which no change of basis covers here"
        )


def _weights_of(module: Any) -> LatentWeights:
    up = module.kv_b_proj.weight.detach()
    nope, value = module.qk_nope_head_dim, module.v_head_dim
    up = up.view(module.num_heads, nope + value, module.kv_lora_rank)
    return LatentWeights(
        down_DX=module.kv_a_proj_with_mqa.weight.detach()[: module.kv_lora_rank],
        gamma_D=module.kv_a_layernorm.weight.detach(),
        w_kc_HND=up[:, :nope],
        w_vc_HDV=up[:, nope:].mT,
    )


class _SlicedForward:
    """Forward of one attention module."""

    def __init__(
        self, module: Any, layer: SlicedLayer, prompt: int, see: SeeLayer | None = None
    ) -> None:
        self._module, self._layer, self._prompt, self._see = module, layer, prompt, see
        self._gamma = float(layer.weights.gamma_D[0])
        self._eps = float(module.kv_a_layernorm.variance_epsilon)
        kv_a = module.kv_a_proj_with_mqa.weight
        self._down = torch.cat(
            [layer.weights.down_DX.to(kv_a), kv_a.detach()[module.kv_lora_rank :]]
        )

    def __call__(
        self, hidden_states: Tensor, *_: Any, position_embeddings: Any, **__: Any
    ) -> tuple[Tensor, None]:
        """What ``DeepseekV2Attention.forward`` returns, without a cache and without padding."""
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb

        module = self._module
        if module.q_lora_rank is None:
            query = module.q_proj(hidden_states)
        else:
            query = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (-1, module.qk_head_dim)).transpose(1, 2)
        q_nope, q_rope = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
        latent, k_rope = (hidden_states @ self._down.mT).split(
            [module.kv_lora_rank, module.qk_rope_head_dim], -1
        )
        q_rope, k_rope = apply_rotary_emb(q_rope, k_rope[:, None], position_embeddings)
        rows = LatentRows(
            q_nope_BTHN=q_nope.transpose(1, 2),
            q_rope_BTHR=q_rope.transpose(1, 2),
            latent_BSD=self._norm(latent),
            k_rope_BSR=k_rope[:, 0],
        )
        if self._see is not None:
            self._see(module.layer_idx, rows.q_nope_BTHN.flatten(0, 1), rows.latent_BSD.flatten(0, 1))  # fmt: skip
        values = self._attend(rows, module.scaling).flatten(2)
        return module.o_proj(values), None

    def _norm(self, latent: Tensor) -> Tensor:
        exact = exact_norm(latent, self._gamma, self._eps)
        if self._layer.shares is None:
            return exact
        sliced = sliced_norm(latent, self._gamma, self._eps, self._layer.shares)
        return torch.cat([exact[:, : self._prompt], sliced[:, self._prompt :]], 1)

    def _attend(self, rows: LatentRows, scale: float) -> Tensor:
        layer, prompt = self._layer, self._prompt
        parts = []
        if prompt:
            first = _cut(rows, slice(0, prompt), prompt)
            parts.append(unsliced_attention(first, layer.weights, scale))
        later = _cut(rows, slice(prompt, None), rows.latent_BSD.shape[1])
        if layer.grouped:
            parts.append(gla_attention(later, layer.weights, scale, ranks=layer.ranks))
        else:
            parts.append(
                tpla_attention(
                    later,
                    layer.weights,
                    scale,
                    ranks=layer.ranks,
                    logit_scales=layer.logit_scales,
                )
            )
        return torch.cat(parts, 1)


def _cut(rows: LatentRows, asking: slice, seen: int) -> LatentRows:
    return LatentRows(
        q_nope_BTHN=rows.q_nope_BTHN[:, asking],
        q_rope_BTHR=rows.q_rope_BTHR[:, asking],
        latent_BSD=rows.latent_BSD[:, :seen],
        k_rope_BSR=rows.k_rope_BSR[:, :seen],
    )
