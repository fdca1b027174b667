"""The packaged models' tokenizer and sentence vectors for a memory's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_pipeline.memory import MemoryConfig, Planner
from rag_pipeline.prompts.tokenizer import ModelTokenizer
from retrievers.embedding import Embedder

Encode = Callable[[list[str]], Any]


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> ModelTokenizer:
    return ModelTokenizer.load(smollm2_path)


@pytest.fixture(scope="session")
def encode(minilm_path: Path) -> Encode:
    """The packaged sentence model; a text is computed once per session."""
    embedder, known = Embedder(minilm_path), {}

    def vectors(texts: list[str]) -> Any:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, embedder.encode_documents(new), strict=True))
        return np.stack([known[text] for text in texts])

    return vectors


@pytest.fixture
def make_planner(tokenizer: ModelTokenizer, encode: Encode) -> Callable[..., Planner]:
    """A planner of small sizes; names of fields change them."""

    def make(context_length: int = 4096, **fields: Any) -> Planner:
        sizes = {
            "budget_tokens": 192,
            "block_tokens": 64,
            "episodes": 3,
            "probe_tokens": 128,
            "cluster_segments": 2,
            "retrieved_share": 0.0,
        }
        config = MemoryConfig(**{**sizes, **fields})
        return Planner(config, tokenizer, encode, context_length=context_length)

    return make
