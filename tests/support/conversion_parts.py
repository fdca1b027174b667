"""Parts of the tests of conversions: tiny models, and one layer of them on real text."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rag_eval.benchmarks.tiny_model import peak_attention, tiny_config
from rag_pipeline.conversion.layers import attend, rms_norm, rotations
from rag_pipeline.conversion.source import LayerWeights, SourceShape, SourceWeights, read_shape
from rag_pipeline.conversion.statistics import LayerStatistics

WINDOW = 48


def write_llama(
    folder: Path, like: Path, *, related: bool = False, family: str = "llama", **fields: Any
) -> Path:
    """Write a tiny model of random weights whose attention matters.

    Parameters
    ----------
    folder, like : Path
        Where to, and the model that lends its tokenizer.
    related : bool
        Whether keys of every head are those of the first, each frequency scaled and turned by an angle of the head.
    family : str
        As for :func:`tiny_config`.
    **fields
        Of the configuration.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    common = {"vocab_size": 49152, "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2}
    config = tiny_config(family, **(common | {"rms_norm_eps": 1e-5} | fields))
    model = AutoModelForCausalLM.from_config(config)
    peak_attention(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            if "embed" in name:
                parameter.normal_(0.0, 0.02)  # small enough for the norms' eps to matter
            if related and "k_proj.weight" in name:
                _relate(parameter, config.num_key_value_heads)
    model.to(torch.float32).save_pretrained(folder)
    for file in like.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder / file.name)
    return folder


def _relate(keys: Tensor, heads: int) -> None:
    first, *others = keys.view(heads, 2, -1, keys.shape[-1])
    number = torch.complex(first[0], first[1])
    for place, other in enumerate(others, 1):
        angles = torch.linspace(0.3, 2.0, len(number)) * place
        turned = number * torch.polar(torch.linspace(0.5, 1.5, len(number)), angles)[:, None]
        other.copy_(torch.stack([turned.real, turned.imag]))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A layer, its normed inputs on some windows, and their statistics."""

    layer: LayerWeights
    shape: SourceShape
    inputs: Tensor
    statistics: LayerStatistics
    turn: Tensor

    def original(self) -> Tensor:
        """Attention of the original, before the output projection."""
        return torch.stack(
            [attend(self.layer, h, self.shape, self.turn).heads_out for h in self.inputs]
        )


def sample_of(folder: Path, windows: int = 3) -> Sample:
    """First layer of a model on random tokens."""
    shape, weights = read_shape(folder), SourceWeights(folder)
    layer = weights.layer(0)
    rows = torch.randint(
        2, shape.vocabulary, (windows, WINDOW), generator=torch.Generator().manual_seed(5)
    )
    inputs = rms_norm(weights.embedding()[rows], layer.attention_norm, shape.eps)
    turn = rotations(WINDOW, shape.frequencies)
    statistics = LayerStatistics.empty(shape, WINDOW)
    for window in inputs:
        statistics.add(attend(layer, window, shape, turn))
    return Sample(layer=layer, shape=shape, inputs=inputs, statistics=statistics, turn=turn)
