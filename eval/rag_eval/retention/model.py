"""A model of ``transformers`` that runs over keys and values handed in, and shows those of its own rows.

Shape letters: m cached keys, T rows, H KV heads, Q query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rag_eval.errors import EvalError

_NAME = "rag_eval_retention"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerRows:
    """Queries, keys and values of a pass in one layer, rotated for their true positions.

    Attributes
    ----------
    q : Tensor
        ``[Q, T, D]``.
    k, v : Tensor
        ``[H, T, D]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerCache:
    """Keys and values of a layer. Slot ``i`` of a head may be another token than slot ``i`` of its neighbour.

    Attributes
    ----------
    k, v : Tensor
        ``[H, m, D]``.
    positions : Tensor
        int64 ``[H, m]``, rising but for slots that pad a head: they are -1 there, and never read.
    """

    k: Tensor
    v: Tensor
    positions: Tensor

    @classmethod
    def of_rows(cls, rows: LayerRows, start: int) -> LayerCache:
        """Rows of one pass, the first one at a position."""
        heads, tokens, _ = rows.k.shape
        return cls(
            k=rows.k,
            v=rows.v,
            positions=torch.arange(start, start + tokens).expand(heads, -1),
        )

    def __add__(self, other: LayerCache) -> LayerCache:
        """Put another cache behind this one; padding between both stays where it is."""
        return LayerCache(
            k=torch.cat((self.k, other.k), 1),
            v=torch.cat((self.v, other.v), 1),
            positions=torch.cat((self.positions, other.positions), 1),
        )

    def part(self, start: int, end: int) -> LayerCache:
        """Columns ``start`` to ``end`` of every head, ``end`` not among them."""
        return LayerCache(
            k=self.k[:, start:end], v=self.v[:, start:end], positions=self.positions[:, start:end]
        )

    def take(self, columns: Tensor, counts: Tensor | None = None) -> LayerCache:
        """Columns of each head, int64 ``[H, m]``; of head ``h`` the first ``counts[h]`` count, the others pad."""
        index = columns[..., None].expand(-1, -1, self.k.shape[-1])
        positions = self.positions.gather(1, columns)
        if counts is not None:
            positions = positions.masked_fill(torch.arange(columns.shape[1]) >= counts[:, None], -1)
        return LayerCache(k=self.k.gather(1, index), v=self.v.gather(1, index), positions=positions)


def joined(a: Sequence[LayerCache], b: Sequence[LayerCache]) -> list[LayerCache]:
    """Put the caches of all layers behind others; either may be empty."""
    return [x + y for x, y in zip(a, b, strict=True)] if a and b else list(a or b)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pass:
    """What a forward pass gave: fp32 logits ``[rows, vocabulary]`` of its last rows, and the rows of each layer."""

    logits: Tensor
    layers: list[LayerRows]


class ShownModel:
    """A causal model that reads caches of any shape.

    Parameters
    ----------
    model : object
        A model of ``transformers`` for causal language modelling, already loaded.
    """

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_NAME, _attention)
        model.set_attn_implementation(_NAME)
        self.model = model.eval()
        self.num_layers = int(model.config.num_hidden_layers)

    @classmethod
    def load(cls, folder: Path, dtype: str = "float32") -> ShownModel:
        """Load weights in Hugging Face format, with a dtype of torch by name or that of the file (``auto``)."""
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))

    def forward(
        self,
        ids: Sequence[int],
        start: int,
        caches: Sequence[LayerCache] = (),
        *,
        logits: int = 1,
    ) -> Pass:
        """Compute tokens at positions from ``start`` on, behind cached keys that all of them see.

        Parameters
        ----------
        ids : sequence of int
            Tokens, one at least.
        start : int
            Position of the first.
        caches : sequence of LayerCache
            One per layer; none for an empty cache.
        logits : int
            Last rows whose logits are wanted.
        """
        seen: dict[int, LayerRows] = {}
        with torch.inference_mode():
            found = self.model(
                torch.tensor([list(ids)]),
                position_ids=torch.arange(start, start + len(ids))[None],
                use_cache=False,
                logits_to_keep=logits,
                retention_caches=caches,
                retention_rows=seen,
                retention_biases={},
            )
        if len(seen) != self.num_layers:
            raise EvalError(
                f"{len(seen)} of {self.num_layers} layers showed their attention; transformers runs them another way"
            )
        return Pass(
            logits=found.logits[0].float(), layers=[seen[i] for i in range(self.num_layers)]
        )


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    retention_caches: Sequence[LayerCache],
    retention_rows: dict[int, LayerRows],
    retention_biases: dict[int, Tensor],
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend to the cached keys and, causally, to the rows' own."""
    if more.get("softcap") or more.get("sliding_window"):
        raise EvalError("the model caps its logits or has a window; retention is not defined there")
    q, k, v = query[0], key[0], value[0]
    retention_rows[module.layer_idx] = LayerRows(q=q, k=k, v=v)
    heads, rows, size = k.shape
    group = q.shape[0] // heads
    cached, holes = 0, None
    if retention_caches:
        cache = retention_caches[module.layer_idx]
        cached = cache.k.shape[1]
        k, v = torch.cat((cache.k, k), 1), torch.cat((cache.v, v), 1)
        if bool((cache.positions < 0).any()):
            holes = (cache.positions < 0).repeat_interleave(group, 0)
    # Added to logits. It is the same in all layers that hold as many keys; a mask of truth values is slow.
    bias = retention_biases.get(cached)
    if bias is None:
        bias = torch.full((rows, cached + rows), float("-inf"), dtype=q.dtype).triu(cached + 1)
        retention_biases[cached] = bias
    if holes is not None:
        bias = bias.repeat(q.shape[0], 1, 1)
        bias[..., :cached].masked_fill_(holes[:, None], float("-inf"))
    out = scaled_dot_product_attention(
        q[None],
        k.repeat_interleave(group, 0)[None],
        v.repeat_interleave(group, 0)[None],
        attn_mask=bias if holes is None else bias[None],
        scale=more.get("scaling") or size**-0.5,
    )
    return out.transpose(1, 2), None
