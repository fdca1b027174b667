"""Runs on a real engine: logits against transformers, cache state between modes, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rag_eval import DatasetOptions, EvalConfig, run_eval
from rag_eval.datasets import load_dataset
from rag_eval.metrics import kl_divergence, log_softmax
from rag_eval.runner import parse_modes, run
from rag_eval.runner.measure import measure_example
from rag_eval.runner.modes import Mode

pytestmark = pytest.mark.engine

OPTIONS = DatasetOptions(chunks=3, chunk_tokens=64)
# bf16 weights, activations and logits against fp32: 0.005 was the largest of 16 tokens measured.
BF16_KL = 0.03


@pytest.fixture(scope="module")
def prompts(prompt_maker: Any) -> list[Any]:
    examples = load_dataset("planted-1hop", encode=prompt_maker.encode, options=OPTIONS, limit=3)
    return [prompt_maker.make(example, OPTIONS) for example in examples]


def test_forced_logits_are_those_of_transformers(
    eval_session: Any, prompts: list[Any], smollm2_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    for prompt in prompts:
        eval_session.flush()
        logits, usage = eval_session.follow_gold(prompt, Mode(name="full"))
        ids = [*prompt.input_ids, *prompt.gold_ids]
        with torch.no_grad():
            whole = model(torch.tensor([ids])).logits[0]
        wanted = whole[len(prompt.input_ids) - 1 : -1].numpy()
        divergence = kl_divergence(log_softmax(wanted), log_softmax(logits))
        assert usage["exact_prefix_tokens"] == 0
        assert divergence.max() < BF16_KL, divergence
        # The same rows of another prompt are far away: the comparison can fail.
        other = kl_divergence(log_softmax(np.roll(wanted, 1, axis=0)), log_softmax(logits))
        assert other.max() > 10 * BF16_KL


def test_reference_and_prefix_agree_within_the_noise_and_are_charged(
    eval_session: Any, prompts: list[Any]
) -> None:
    record = measure_example(
        eval_session,
        prompts[0],
        parse_modes("full,prefix"),
        max_new_tokens=6,
        turn=0,
        with_noise_floor=True,
    )
    full, prefix = record["modes"]["full"], record["modes"]["prefix"]
    assert full["computed_fraction"] == 1.0
    # The first chunk follows the shared prefix as it did when it was computed: an exact hit.
    first = len(prompts[0].prefix_ids) + len(prompts[0].chunks[0].ids)
    assert prefix["exact_prefix_tokens"] >= first
    assert prefix["computed_fraction"] < 1.0
    assert full["kl_answer"] == 0.0
    assert prefix["kl_answer"] < BF16_KL
    assert record["noise_floor"]["kl_answer"] < BF16_KL
    assert full["ttft_s"] > 0
    json.dumps(record, allow_nan=False)


def test_fusion_modes_ratio_one_is_full_and_reuse_is_not(
    eval_session: Any, prompts: list[Any]
) -> None:
    records = [
        measure_example(
            eval_session,
            prompt,
            parse_modes("full,reuse,query:1.0"),
            max_new_tokens=6,
            turn=turn,
            with_noise_floor=False,
        )
        for turn, prompt in enumerate(prompts)
    ]
    for record in records:
        assert record["modes"]["query:1.0"]["kl_answer"] < BF16_KL
        assert record["modes"]["reuse"]["reused_tokens"] > 0
        assert record["modes"]["reuse"]["forced_usage"]["fallback"] == ""
        assert record["modes"]["reuse"]["computed_fraction"] < 0.5
    assert max(record["modes"]["reuse"]["kl_answer"] for record in records) > 2 * max(
        record["modes"]["query:1.0"]["kl_answer"] for record in records
    )


def test_an_interrupted_run_goes_on_and_writes_everything(
    eval_session: Any, smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kept:
        """The suite's session, which the run must not shut down."""

        def __getattr__(self, name: str) -> Any:
            return (lambda: None) if name == "close" else getattr(eval_session, name)

    started: list[str] = []
    monkeypatch.setattr(run, "start_session", lambda *given: started.append("") or Kept())

    def config(limit: int) -> EvalConfig:
        return EvalConfig(
            dataset="planted-1hop",
            model=str(smollm2_path),
            out=tmp_path,
            modes="full,prefix",
            limit=limit,
            options=OPTIONS,
            max_new_tokens=4,
            noise_every=1,
        )

    lines: list[str] = []
    run_eval(config(1), lines.append)
    result = run_eval(config(2), lines.append)
    assert result.n == 2
    assert "2 examples, 1 done before" in lines
    run_eval(config(2))
    assert len(started) == 2  # nothing left to do: no engine
    assert json.loads((tmp_path / "metrics.json").read_text("utf-8")) == result.to_json()
    assert len((tmp_path / "predictions.jsonl").read_text("utf-8").splitlines()) == 2
    assert result.noise_floor["n"] == 2
    for name in ("config.yaml", "table.txt", "kl_over_computed.png"):
        assert (tmp_path / name).stat().st_size > 0
