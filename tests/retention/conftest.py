"""A small Llama with random weights, as it is and as the reference runs it."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rag_eval.retention import ShownModel


@pytest.fixture(scope="session")
def plain() -> LlamaForCausalLM:
    """A small Llama with random weights, and its own attention."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=6, num_key_value_heads=2, initializer_range=0.5,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="session")
def model(plain: LlamaForCausalLM) -> ShownModel:
    """Make one of the same weights that reads caches."""
    return ShownModel(deepcopy(plain))
