"""Real attention of a model over a few prompts: what methods keep of it, and the options that bring them to one density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rag_eval.benchmarks.attention_density import brought_to
from rag_eval.benchmarks.attention_mass import Kept, MassGrid, added, density_of
from rag_eval.benchmarks.attention_model import MethodModel, blocks_of
from rag_eval.benchmarks.named_methods import named_method
from rag_eval.command import Progress, no_progress
from rag_kernels.attention.base import AttentionCall


class SeenAttention:
    """Queries and keys of all layers, and the mass of dense attention in each.

    Parameters
    ----------
    model : MethodModel
        Runs densely.
    fingerprint : str
        Of its checkpoint; SALE's thresholds go by it.
    prompts : mapping of str to sequence of int
        By name.
    progress : callable
        Told of each prompt.
    """

    def __init__(
        self,
        model: MethodModel,
        fingerprint: str,
        prompts: Mapping[str, Sequence[int]],
        progress: Progress = no_progress,
    ) -> None:
        self._fingerprint = fingerprint
        self._seen: dict[str, list[tuple[int, AttentionCall, MassGrid]]] = {}
        for name, ids in prompts.items():
            progress(f"dense attention of {len(ids)} tokens, {name}")
            calls = self._seen[name] = []

            def see(layer: int, call: AttentionCall, calls: list[Any] = calls) -> None:
                grid = MassGrid(call.q_RNH, call.k_pool, call.scale)
                calls.append((layer, call, grid))

            model.prefill(ids, see=see)

    def kept(self, text: str) -> dict[str, list[Kept]]:
        """What a method keeps, by prompt and layer."""
        method = named_method(text).for_model(self._fingerprint)
        return {
            name: [grid.kept(blocks_of(method, layer, call)) for layer, call, grid in calls]
            for name, calls in self._seen.items()
        }

    def density(self, text: str) -> float:
        """Share of the keys that a method reads, all prompts together."""
        return _density(self.kept(text))

    def report(self, text: str) -> dict[str, Any]:
        """Density and recall of attention mass, all together and by prompt."""
        kept = self.kept(text)
        by_head = torch.stack(
            [
                added([layers[at] for layers in kept.values()]).recall
                for at in range(len(next(iter(kept.values()))))
            ]
        )
        made: dict[str, Any] = {
            "density": round(_density(kept), 4),
            "recall": round(float(by_head.mean()), 4),
            "recall_worst": round(float(by_head.min()), 4),
            "recall_heads": by_head.numel(),
        }
        for name, layers in kept.items():
            recall = torch.stack([layer.recall for layer in layers])
            made[f"density_{name}"] = round(density_of(layers), 4)
            made[f"recall_{name}"] = round(float(recall.mean()), 4)
        return made

    def brought_to(
        self, density: float, names: Sequence[str], tokens: int, progress: Progress = no_progress
    ) -> dict[str, dict[str, Any]]:
        """Bring methods to a density.

        Returns
        -------
        dict
            By name as given: ``options``, the method as a request names it, and :meth:`report` of it.
        """
        told: dict[str, dict[str, Any]] = {}
        for name in names:
            options = brought_to(name, density, tokens, self.density)
            told[name] = {"options": options} | self.report(options)
            progress(f"{tokens} tokens, {told[name]}")
        return told


def _density(kept: Mapping[str, Sequence[Kept]]) -> float:
    return density_of([part for layers in kept.values() for part in layers])
