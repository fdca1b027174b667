"""Statistics of all layers of a model in one safetensors file, tied to the weights they were measured with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rag_kernels.latent.statistics import LatentStatistics

FORMAT = "1"
"""Version of the file; others are not read."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModelStatistics:
    """What ``rag-pipeline tpla calibrate`` writes.

    Attributes
    ----------
    model : str
        As people call it.
    fingerprint : str
        Of the checkpoint that was measured.
    tokens : int
        How many were seen.
    layers : tuple of LatentStatistics
        In the order of the model.
    text_marks : Tensor
        int64 ``[n]``, hashes of runs of the text, by which another text is told not to be the same.
    """

    model: str
    fingerprint: str
    tokens: int
    layers: tuple[LatentStatistics, ...]
    text_marks: Tensor

    def to_bytes(self) -> bytes:
        """The file's bytes; :meth:`read` reads them."""
        from safetensors.torch import save

        tensors = {"text_marks": self.text_marks.contiguous()}
        for number, layer in enumerate(self.layers):
            tensors[f"layers.{number}.latent"] = layer.latent_DD.contiguous()
            tensors[f"layers.{number}.weight"] = layer.weight_DD.contiguous()
        about = {"model": self.model, "fingerprint": self.fingerprint, "tokens": str(self.tokens)}
        content: bytes = save(tensors, metadata={"format": FORMAT, **about})
        return content

    @classmethod
    def read(cls, path: Path) -> ModelStatistics:
        """Read a file.

        Raises
        ------
        ValueError
            One line: it cannot be read, or holds no statistics.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"statistics {path} cannot be read: {error}") from None
        if about.get("format") != FORMAT:
            raise ValueError(f"{path} holds no statistics of format {FORMAT}; calibrate again")
        try:
            marks = tensors.pop("text_marks")
            layers = tuple(
                LatentStatistics(
                    latent_DD=tensors[f"layers.{number}.latent"],
                    weight_DD=tensors[f"layers.{number}.weight"],
                )
                for number in range(len(tensors) // 2)
            )
            finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
            found = cls(
                model=about["model"],
                fingerprint=about["fingerprint"],
                tokens=int(about["tokens"]),
                layers=layers,
                text_marks=marks,
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"statistics {path} are not whole: {error}") from None
        if not layers or not finite:
            raise ValueError(f"statistics {path} are not whole: no layer, or numbers out of range")
        return found

    def check(self, fingerprint: str, dims: list[int] | None = None) -> None:
        """Refuse statistics of another model.

        Parameters
        ----------
        fingerprint : str
            Of the checkpoint that they are to serve.
        dims : list of int, optional
            Width of the latent of each of its layers, where they are known.

        Raises
        ------
        ValueError
            One line.
        """
        widths = [layer.dim for layer in self.layers]
        if self.fingerprint != fingerprint or dims not in (None, widths):
            raise ValueError(
                f"the statistics are those of {self.model} (weights {self.fingerprint}), not of these weights "
                f"({fingerprint}); calibrate this model."
            )
