"""Tiny models of random weights behind a real tokenizer: engines that start and answer at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def write_tiny_model(
    folder: Path,
    like: Path,
    *,
    layers: int = 4,
    context: int = 4096,
    tied: bool = True,
    peaked: bool = False,
) -> Path:
    """Write a Llama of random fp32 weights, always the same ones.

    Parameters
    ----------
    folder : Path
        Where to; made if it is not there.
    like : Path
        Folder of the model whose vocabulary, tokenizer and chat template it gets.
    layers, context : int
        Layers, and the longest prompt in tokens.
    tied : bool
        Whether embedding and output share their weights.
    peaked : bool
        See :func:`peak_attention`.

    Returns
    -------
    Path
        `folder`.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    known = json.loads((like / "config.json").read_text("utf-8"))
    config = LlamaConfig(
        vocab_size=known["vocab_size"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=known.get("bos_token_id"),
        eos_token_id=known.get("eos_token_id"),
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    if peaked:
        peak_attention(model)
    model.to(torch.float32).save_pretrained(folder)
    for file in like.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder / file.name)
    return folder


def peak_attention(model: Any) -> None:
    """Draw a model's matrices anew, large enough for attention to matter: a wrong key changes the answer."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                scale = 3.0 if "q_proj" in name or "k_proj" in name else 1.5
                parameter.normal_(0.0, scale / parameter.shape[1] ** 0.5)
