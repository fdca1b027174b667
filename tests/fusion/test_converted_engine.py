"""A converted model in the real engine: against transformers, prefix hits and batches among it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversion_parts import write_llama
from latent_answers import answers_agree, reference

from rag_pipeline.conversion import ConversionConfig, convert_to_mla


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """A tiny Llama with two key heads in latent form, its four heads padded to eight."""
    folder = tmp_path_factory.mktemp("converted")
    model = write_llama(folder / "model", smollm2_path)
    sizes: dict[str, Any] = {"rope": 16, "latent": 32, "pad_heads_to": 8, "dtype": "float32"}
    few = {"window": 64, "calibration_tokens": 1024, "held_out_tokens": 64}
    convert_to_mla(model, folder / "out", ConversionConfig(**sizes, **few))
    return folder / "out"


@pytest.fixture
def served(converted: Path, engine: Callable[..., Any]) -> tuple[Any, Any]:
    """An engine, and the same folder by transformers."""
    return engine(str(converted)), reference(converted)


def test_the_engine_answers_as_transformers_does(served: tuple[Any, Any]) -> None:
    answers_agree(*served)


def test_the_pool_holds_the_latent_and_the_position_part(served: tuple[Any, Any]) -> None:
    pool = served[0].scheduler.tp_worker.model_runner.token_to_kv_pool
    assert {tuple(buffer.shape[1:]) for buffer in pool.kv_buffer} == {(1, 32 + 16)}
