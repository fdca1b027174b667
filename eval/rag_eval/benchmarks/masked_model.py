"""A model whose layers read by a static method, run by ``transformers`` in fp32: no engine and no kernel takes part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rag_eval.benchmarks.named_methods import static_density, static_named
from rag_kernels.sparse.static_blocks import StaticBlocks


def with_dense(names: Sequence[str]) -> dict[str, StaticBlocks | None]:
    """Static methods by their names, behind ``dense``, which is None."""
    return {"dense": None} | {name: static_named(name) for name in names}


def reads_of(method: StaticBlocks | None, tokens: int) -> dict[str, Any]:
    """``blocks_last_row``, and ``density`` (keys read of those before, in sparse layers); nothing of dense attention."""
    if method is None:
        return {}
    return {
        "blocks_last_row": method.decode_blocks(tokens - 1).numel(),
        "density": round(static_density(method, tokens), 4),
    }


def mask_of(method: StaticBlocks, tokens: int) -> Tensor:
    """What each row reads, causality on top; bool ``[tokens, tokens]``."""
    block = torch.arange(tokens) // method.config.block
    return method.allowed(0, int(block[-1]))[block][:, block].tril()


class MaskedModel:
    """A model of ``transformers`` whose layers read by a method, as long as there is one.

    Parameters
    ----------
    folder : str
        Weights that transformers reads; computed in fp32.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self._method: StaticBlocks | None = None
        self._mask: Tensor | None = None
        for index, layer in enumerate(self.model.model.layers):
            layer.self_attn.register_forward_pre_hook(self._hook(index), with_kwargs=True)

    def _hook(self, index: int) -> Any:
        def replace(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if self._method is None or self._method.reads_all(index):
                return None
            assert self._mask is not None
            return args, kwargs | {"attention_mask": self._mask[None, None]}

        return replace

    def logits(self, ids: Tensor, method: StaticBlocks | None, last: int) -> Tensor:
        """fp32 ``[last, vocabulary]`` of the last tokens of a text; every key is read without a method."""
        self._method = method
        self._mask = None if method is None else mask_of(method, len(ids))
        with torch.inference_mode():
            found: Tensor = self.model(ids[None], use_cache=False, logits_to_keep=last).logits[0]
        return found.float()

    def loss(self, ids: Tensor, method: StaticBlocks | None) -> float:
        """Mean loss of the second half of a text, nats per token."""
        half = len(ids) // 2
        logits = self.logits(ids, method, len(ids) - half)
        return float(cross_entropy(logits[:-1], ids[half + 1 :]))
