"""Statistics of a model's latents over a text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rag_eval.command import Progress, no_progress
from rag_eval.tpla.model import LatentModel
from rag_eval.tpla.texts import batches
from rag_kernels.latent import LatentStatistics, StatisticsSum


def calibrate(
    model: LatentModel,
    windows: Sequence[Tensor],
    *,
    batch: int = 8,
    progress: Progress = no_progress,
) -> tuple[LatentStatistics, ...]:
    """Prefill windows of a text, unsliced, and sum up what each layer computes from.

    Parameters
    ----------
    model : LatentModel
        Left as transformers computes it.
    windows : sequence of Tensor
        int64 ``[tokens]`` each, of equal length.
    batch : int
        Windows at a time.
    progress : callable
        Told after each batch.
    """
    sums = [
        StatisticsSum(weights, model.out_HVX(layer)) for layer, weights in enumerate(model.weights)
    ]

    def see(layer: int, query: Tensor, latent: Tensor) -> None:
        sums[layer].add(query, latent)

    model.show_layers(see)
    try:
        for ids in batches(windows, batch):
            model.losses(ids, 1)
            progress(f"{sums[0].tokens} tokens seen")
    finally:
        model.as_it_is()
    return tuple(total.result() for total in sums)
