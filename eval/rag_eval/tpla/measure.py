"""Perplexity of each variant on the same windows, decoded tokens only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_eval.metrics.bootstrap import paired_bootstrap
from rag_eval.tpla.model import LatentModel, SlicedLayer
from rag_eval.tpla.texts import Windows, batches
from rag_kernels.latent import (
    BASES,
    LatentStatistics,
    create_basis,
    energy_shares,
    literal_scales,
    rank_slice,
)

UNSLICED, GLA = "unsliced", "gla"
VARIANTS = (UNSLICED, GLA, *BASES)
"""What can be measured: the model as it is, GLA on the checkpoint's own basis, and TPLA by basis."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceOptions:
    """How the latents are sliced.

    Attributes
    ----------
    ranks : int
        Slices, 2 or 4.
    prefill : str
        ``unsliced``: prompts are computed with the whole latent, and each rank keeps its slice (the default).
        ``sliced``: as decoded tokens are.
    norm : str
        ``exact``: of the whole latent (the default). ``sliced``: the paper's, of each slice.
    logits : str
        ``plain``: as the slice gives them (the default). ``literal``: divided by the slice's share of energy.
    """

    ranks: int = 2
    prefill: str = "unsliced"
    norm: str = "exact"
    logits: str = "plain"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("ranks", (2, 4)),
            ("prefill", ("unsliced", "sliced")),
            ("norm", ("exact", "sliced")),
            ("logits", ("plain", "literal")),
        ):
            if getattr(self, name) not in allowed:
                raise EvalError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(str, allowed))}"
                )


def measure(
    model: LatentModel,
    windows: Sequence[Tensor],
    cut: Windows,
    variants: Sequence[str],
    statistics: Sequence[LatentStatistics] | None,
    options: SliceOptions,
    *,
    batch: int = 8,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Score the windows under each variant.

    Parameters
    ----------
    model : LatentModel
        Left as transformers computes it.
    windows : sequence of Tensor
        As ``cut`` made them.
    cut : Windows
        Where prompts end.
    variants : sequence of str
        Of :data:`VARIANTS`.
    statistics : sequence of LatentStatistics, optional
        Of the layers; for the bases that need them, and for shares of slices.
    options : SliceOptions
        For all variants.
    batch : int
        Windows at a time.
    progress : callable
        Told of each variant.

    Returns
    -------
    dict
        ``n_tokens``, ``ppl``, ``excess`` (perplexity over the unsliced model's, less one, with its 95% interval over
        windows) and ``kv_bytes_per_token_per_rank``, by variant. ``interrupted`` where it was broken off.
    """
    dim, losses, broken = model.dim, {}, False
    rank_slice(dim, 0, options.ranks)
    prompt = cut.prompt if options.prefill == "unsliced" else 0
    try:
        for name in variants:
            if name == UNSLICED:
                model.as_it_is()
            else:
                model.slice_layers(_layers(model, name, statistics, options), prompt)
            each: list[float] = []
            for ids in batches(windows, batch):
                each += model.losses(ids, cut.scored).mean(1).tolist()
            losses[name] = each
            progress(f"{name}: perplexity {_perplexity(each):.3f}")
    except KeyboardInterrupt:
        broken = True
    finally:
        model.as_it_is()
    return {
        "n_tokens": len(windows) * cut.scored,
        "n_windows": len(windows),
        "ppl": {name: _perplexity(each) for name, each in losses.items()},
        "excess": _excess(losses),
        "kv_bytes_per_token_per_rank": {
            name: _bytes(model, 1 if name == UNSLICED else options.ranks) for name in losses
        },
        "interrupted": broken,
    }


def _layers(
    model: LatentModel,
    name: str,
    statistics: Sequence[LatentStatistics] | None,
    options: SliceOptions,
) -> list[SlicedLayer]:
    found = []
    for number, weights in enumerate(model.weights):
        own = None if statistics is None else statistics[number]
        basis = create_basis("identity" if name == GLA else name, weights.dim, own, seed=number)
        shares = None
        if options.norm == "sliced" or options.logits == "literal":
            if own is None:
                raise EvalError("shares of the slices need statistics of the model; give them")
            shares = energy_shares(own.latent_DD, basis, options.ranks)
        literal = options.logits == "literal" and shares is not None
        found.append(
            SlicedLayer(
                weights=weights.rotated(basis),
                ranks=options.ranks,
                grouped=name == GLA,
                shares=shares if options.norm == "sliced" else None,
                logit_scales=literal_scales(shares) if literal and shares else None,
            )
        )
    return found


def _bytes(model: LatentModel, ranks: int) -> int:
    config = model.config
    width = model.dim // ranks + config.qk_rope_head_dim
    return int(width * config.num_hidden_layers * model.model.dtype.itemsize)


def _perplexity(losses: Sequence[float]) -> float:
    # What is far beyond any vocabulary is no number that JSON has.
    return math.exp(min(sum(losses) / len(losses), 300.0))


def _excess(losses: dict[str, list[float]]) -> dict[str, list[float]]:
    if UNSLICED not in losses:
        return {}
    found = {}
    for name, each in losses.items():
        gap = paired_bootstrap(each, losses[UNSLICED])
        found[name] = [math.expm1(min(x, 300.0)) for x in (gap.mean, gap.low, gap.high)]
    return found
