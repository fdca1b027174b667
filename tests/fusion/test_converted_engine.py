"""A converted model in the real engine: against transformers, prefix hits and batches among it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_parts import write_llama
from fusion_helpers import tokens

from rag_pipeline.conversion import ConversionConfig, convert_to_mla

LONG = tokens(150, 60)
ALONG = [*LONG[:100], *tokens(23, 61)]
BATCH = [tokens(37, 62), tokens(60, 63), tokens(21, 64)]


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
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        converted, dtype=torch.float32, attn_implementation="eager"
    )
    return engine(str(converted)), model.eval()


def agrees(model: Any, prompt: list[int], req: Any) -> None:
    """Log-probabilities of the prompt's end and of every decoded token are the reference's."""
    said = list(req.output_ids)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *said[:-1]]])).logits[0, len(prompt) - 1 :]
    wanted = logits.double().log_softmax(-1)
    top = zip(req.logprob.output_top_logprobs_val, req.logprob.output_top_logprobs_idx, strict=True)
    for row, (values, ids) in zip(wanted, top, strict=True):
        torch.testing.assert_close(
            torch.tensor(values).double(), row[torch.tensor(ids)], rtol=0, atol=1e-4
        )
    assert said == wanted.argmax(-1).tolist()


def test_the_engine_answers_as_transformers_does(served: tuple[Any, Any]) -> None:
    local, model = served
    agrees(model, LONG, local.ask(LONG, 6))
    hit = local.ask(ALONG, 6)
    assert hit.cached_tokens == 100
    agrees(model, ALONG, hit)
    reqs = [local.submit(ids, 6) for ids in BATCH]
    local.run(*reqs)
    for ids, req in zip(BATCH, reqs, strict=True):
        agrees(model, ids, req)


def test_the_pool_holds_the_latent_and_the_position_part(served: tuple[Any, Any]) -> None:
    pool = served[0].scheduler.tp_worker.model_runner.token_to_kv_pool
    assert {tuple(buffer.shape[1:]) for buffer in pool.kv_buffer} == {(1, 32 + 16)}
