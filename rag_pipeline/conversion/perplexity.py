"""Perplexity of a folder's model on windows of text, by transformers in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from rag_pipeline.conversion.texts import Windows

_AT_ONCE = 1 << 26
"""Most logits in memory: larger vocabularies are computed in pieces."""


def load_model(folder: Path) -> Any:
    """Load a model as transformers has it, fp32, without its progress bars."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return model.eval()


def nll_sums(model: Any, ids: Sequence[int]) -> float:
    """Sum of negative log-probabilities, in nats, of all tokens of a window but the first."""
    tokens = torch.tensor([list(ids)])
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits[0, :-1]
        rows = max(1, _AT_ONCE // logits.shape[-1])
        return sum(
            float(functional.cross_entropy(part.float(), wanted, reduction="sum"))
            for part, wanted in zip(logits.split(rows), tokens[0, 1:].split(rows), strict=True)
        )


def perplexities(
    folder: Path, texts: Sequence[Windows], progress: Callable[[str], None]
) -> dict[str, float]:
    """Perplexity per text: exponential of the mean negative log-probability.

    Parameters
    ----------
    folder : Path
        In Hugging Face format.
    texts : sequence of Windows
        What to predict.
    progress : callable
        Told a line per text.
    """
    model = load_model(folder)
    found: dict[str, float] = {}
    for text in texts:
        total = sum(nll_sums(model, row) for row in text.rows)
        found[text.name] = math.exp(total / predicted(text))
        progress(f"{text.name}: perplexity {found[text.name]:.3f} on {predicted(text)} tokens")
    return found


def predicted(text: Windows) -> int:
    """Tokens that are predicted: all but each window's first."""
    return sum(len(row) - 1 for row in text.rows)
