"""Latents sliced over two processes of the real engine: exact prefill, and decoding as the formula says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_runs import check_fused, fused_case
from fusion_helpers import VOCAB
from latent_answers import ALONG, BATCH, LONG
from rank_programs import run_ranks

from rag_eval.tpla.calibrate import calibrate
from rag_eval.tpla.model import LatentModel, SlicedLayer
from rag_kernels.latent import LatentStatistics, ModelStatistics, create_basis
from rag_pipeline.models import fingerprint_checkpoint

RANKS = 2


def case_of(folder: Path) -> dict[str, Any]:
    return {"model": str(folder), "prompts": [LONG, ALONG], "batch": BATCH, **fused_case()}


def sliced(
    model: LatentModel, basis: str, seen: tuple[LatentStatistics, ...], ranks: int
) -> list[SlicedLayer]:
    return [
        SlicedLayer(
            weights=weights.rotated(create_basis(basis, weights.dim, own, seed=layer)), ranks=ranks
        )
        for layer, (weights, own) in enumerate(zip(model.weights, seen, strict=True))
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("basis", "fields"),
    [
        # As wide as the latent has directions: in fewer, the first slice would hold all of it.
        ("pca", {"kv_lora_rank": 192, "hidden_size": 256}),
        # DeepSeek's own widths.
        ("hadamard", {"q_lora_rank": 24, "kv_lora_rank": 512}),
    ],
    ids=["pca", "q_lora"],
)
def test_two_ranks_prefill_exactly_and_decode_on_their_slices(
    basis: str,
    fields: dict[str, Any],
    tiny_model: Any,
    tmp_path: Path,
    warm_start: Any,
) -> None:
    folder = tiny_model("deepseek_v2", f"tpla-{basis}", qk_rope_head_dim=64, **fields)
    model = LatentModel.load(folder)
    text = torch.randint(0, VOCAB, (4, 64), generator=torch.manual_seed(1))
    measured = calibrate(model, list(text))
    kept = ModelStatistics(
        model="tiny",
        fingerprint=fingerprint_checkpoint(folder),
        tokens=256,
        layers=measured,
        text_marks=torch.zeros(0, dtype=torch.int64),
    )
    file = tmp_path / "statistics.safetensors"
    file.write_bytes(kept.to_bytes())
    seen = run_ranks(
        "tpla_rank.py",
        case_of(folder),
        tmp_path,
        warm_start,
        RAG_PIPELINE_TPLA=basis,
        RAG_PIPELINE_TPLA_STATISTICS=str(file),
    )
    for one in seen:
        # A token's row is allocated this wide: half of a latent's numbers, and the position part.
        width = {192: 160, 512: 320}[fields["kv_lora_rank"]]
        assert one["shapes"] == [[1, width]] * 5
        assert one["bytes"] == [width * 4] * 5
        # Chunks are stored in slices; a fused prefill attends with whole latents, so it is as exact as any other.
        assert one["self_check"].startswith("passed")
        check_fused(one["fused"])
        # A fault on one rank, before and behind the layer's exchange: both prefill as usual, and nobody waits for ever.
        assert [fallback for fallback, _ in one["faults"]] == ["fused_pass_error"] * 2
        for _, values in one["faults"]:
            pairs = zip(values, one["fused"][0]["logprobs"], strict=True)
            assert max(abs(a - b) for a, b in pairs) < 5e-4
        done, why = one["update"]
        assert not done
        assert "weights cannot be changed" in why
    assert seen[0]["runs"] == seen[1]["runs"]
    layers = sliced(model, basis, measured, RANKS)
    differs = 0.0
    runs = seen[0]["runs"]
    assert [run["cached"] for run in runs] == [0, 100, 0, 0, 0, 0]
    for prompt, run in zip([LONG, ALONG, *BATCH, LONG], runs, strict=True):
        ids = torch.tensor([[*prompt, *run["ids"][:-1]]])
        with torch.inference_mode():
            plain = model.model(ids, use_cache=False).logits[0, len(prompt) - 1 :].log_softmax(-1)
            model.slice_layers(layers, len(prompt))
            wanted = model.model(ids, use_cache=False).logits[0, len(prompt) - 1 :].log_softmax(-1)
            model.as_it_is()
        torch.testing.assert_close(wanted[0], plain[0], rtol=0, atol=1e-4)
        differs = max(differs, float((wanted - plain).abs().max()))
        assert run["ids"] == wanted.argmax(-1).tolist()
        for row, values, places in zip(wanted, run["values"], run["tokens"], strict=True):
            torch.testing.assert_close(torch.tensor(values), row[places], rtol=0, atol=2e-4)
    assert differs > 1e-2


@pytest.mark.slow
def test_one_rank_has_nothing_to_slice_over(
    tiny_model: Any, tmp_path: Path, warm_start: Any
) -> None:
    case = case_of(tiny_model("deepseek_v2"))
    (log,) = run_ranks(
        "tpla_rank.py", case, tmp_path, warm_start, count=1, may_fail=True,
        RAG_PIPELINE_TPLA="identity",
    )  # fmt: skip
    assert isinstance(log, str)
    assert "RAG_PIPELINE_TPLA=identity does not work with one rank" in log


@pytest.mark.slow
def test_a_model_without_its_statistics_does_not_start(
    tiny_model: Any, tmp_path: Path, warm_start: Any
) -> None:
    case, none = case_of(tiny_model("deepseek_v2")), str(tmp_path / "none.safetensors")
    variables = {"RAG_PIPELINE_TPLA": "pca", "RAG_PIPELINE_TPLA_STATISTICS": none}
    for log in run_ranks("tpla_rank.py", case, tmp_path, warm_start, may_fail=True, **variables):
        assert isinstance(log, str)
        assert f"needs statistics of the model, and there is no {none}" in log
