"""What a policy sees of a request: counts and positions, no tensors of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def qkv_share(
    hidden_size: int, num_q_heads: int, num_kv_heads: int, head_dim: int, intermediate_size: int
) -> float:
    """Share of a layer's linear work that is the query, key and value projection (gated MLP assumed).

    Computing a deviation needs exactly this part of a layer for every token.
    """
    qkv = hidden_size * (num_q_heads + 2 * num_kv_heads) * head_dim
    out = hidden_size * num_q_heads * head_dim
    return qkv / (qkv + out + 3 * hidden_size * intermediate_size)


def latent_qkv_share(
    hidden_size: int,
    num_q_heads: int,
    *,
    nope_dim: int,
    rope_dim: int,
    value_dim: int,
    latent: int,
    q_latent: int,
    intermediate_size: int,
) -> float:
    """:func:`qkv_share` of latent attention (MLA) in its absorbed form; ``q_latent`` is 0 where queries have none."""
    q = (q_latent or hidden_size) * num_q_heads * (nope_dim + rope_dim) + hidden_size * q_latent
    qkv = q + hidden_size * (latent + rope_dim) + num_q_heads * nope_dim * latent
    out = num_q_heads * value_dim * (latent + hidden_size)
    return qkv / (qkv + out + 3 * hidden_size * intermediate_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseLayout:
    """One request as a policy sees it.

    Attributes
    ----------
    num_layers : int
        Layers of the model.
    prompt_len : int
        Tokens of the prompt.
    exact_len : int
        Leading tokens whose KV is exact (radix prefix); never computed, never selected.
    spans : tuple of (int, int)
        Half-open position ranges of reused chunks, rising, apart, behind ``exact_len``. One range a chunk: a
        chunk directly behind its own prefix at its original position belongs to ``exact_len`` instead.
    num_scoring_rows : int, optional
        Fresh rows of a pass that only probes (attention or deviation); by default every fresh token, because fresh
        tokens between chunks need KV too.
    qkv_share : float
        Share of a layer's linear work that is QKV, see :func:`qkv_share`.
    probes_restart : bool
        How the engine checks deviation. False: one pass whose rows shrink at the check layers. True: each check is
        a pass of its own from layer 0, fresh rows included, and the final pass starts again; policies then
        charge those passes.
    prefill_s, load_s : float, optional
        Seconds to compute all reused tokens, and to load what the request loads of chunks: inputs of the adaptive
        policy; None before they were measured. Under tensor parallelism every rank must be given the same two
        numbers.
    """

    num_layers: int
    prompt_len: int
    exact_len: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    num_scoring_rows: int | None = None
    qkv_share: float = 0.16
    probes_restart: bool = False
    prefill_s: float | None = None
    load_s: float | None = None

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}; it must be at least 1.")
        if not 0 <= self.exact_len <= self.prompt_len:
            raise ValueError(
                f"exact_len is {self.exact_len}; it must be 0..{self.prompt_len} (the prompt)."
            )
        behind = self.exact_len
        for start, end in self.spans:
            if not behind <= start <= end <= self.prompt_len:
                raise ValueError(
                    f"span {(start, end)} is not in order: spans must rise, not overlap, and lie in "
                    f"{self.exact_len}..{self.prompt_len}."
                )
            behind = end

    @property
    def num_reused(self) -> int:
        """Tokens in reused spans."""
        return sum(end - start for start, end in self.spans)

    @property
    def num_fresh(self) -> int:
        """Tokens that are neither exact nor reused; always computed."""
        return self.prompt_len - self.exact_len - self.num_reused

    @property
    def question_len(self) -> int:
        """Fresh tokens behind the last reused span."""
        return self.prompt_len - (self.spans[-1][1] if self.spans else self.exact_len)

    @property
    def scoring_rows(self) -> int:
        """Fresh rows of a probing pass."""
        return self.num_fresh if self.num_scoring_rows is None else self.num_scoring_rows

    def reused_positions(self) -> Tensor:
        """int64 ``[num_reused]``: positions of the reused tokens, rising."""
        if not self.spans:
            return torch.empty(0, dtype=torch.int64)
        return torch.cat([torch.arange(start, end) for start, end in self.spans])
