"""Whole conversions of tiny models: what transformers loads is what was found, and exact where the form allows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rag_pipeline.conversion import ConversionConfig, ConversionReport, convert_to_mla
from rag_pipeline.conversion.perplexity import load_model
from rag_pipeline.models import resolve_llm
from rag_pipeline.prompts.tokenizer import ModelTokenizer

SMALL: dict[str, Any] = {"window": 64, "calibration_tokens": 512, "held_out_tokens": 128}
LOSSLESS = [
    ({"num_key_value_heads": 1}, 16, 5e-4),
    ({"num_key_value_heads": 1, "tie_word_embeddings": True}, 16, 5e-4),
    ({"num_key_value_heads": 1, "rms_norm_eps": 1e-6}, 16, 5e-4),
    # The heads' relation is found from sums over text, and holds as far as fp32 has it.
    ({"related": True}, 32, 2e-2),
]


def log_probs(folder: Path, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = load_model(folder)(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def convert(model: Path, out: Path, text: Path, latent: int, **more: Any) -> ConversionReport:
    config = ConversionConfig(rope=16, latent=latent, **(SMALL | more))
    return convert_to_mla(model, out, config, calibration=[str(text)])


@pytest.mark.parametrize(("fields", "latent", "apart"), LOSSLESS)
def test_a_lossless_conversion_is_the_original(
    llama: Callable[..., Path],
    tmp_path: Path,
    text: Path,
    fields: dict[str, Any],
    latent: int,
    apart: float,
) -> None:
    """Norms with their own eps, tied output weights, padded heads: all of it is a copy in another form."""
    model, out = llama(**fields), tmp_path / "out"
    report = convert(model, out, text, latent, pad_heads_to=8, dtype="float32")
    ids = list(range(50, 130))
    torch.testing.assert_close(log_probs(out, ids), log_probs(model, ids), rtol=0, atol=apart)
    (only,) = report.perplexity
    assert only.converted == pytest.approx(only.original, rel=1e-3)
    assert only.text == "pydoc-topics"
    assert only.n_tokens == 2 * 63


def test_a_folder_that_loaders_know(
    llama: Callable[..., Path], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several files, if it is large, with the fields that SGLang reads and the tokenizer of the original."""
    monkeypatch.setattr("rag_pipeline.conversion.checkpoint._SHARD_BYTES", 1 << 20)
    model, out = llama(), tmp_path / "out"
    report = convert(model, out, text, 32, dtype="bfloat16", pad_heads_to=8)
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["DeepseekV2ForCausalLM"]
    for name in ("moe_layer_freq", "scoring_func", "topk_method", "norm_topk_prob"):
        assert name in config
    assert (config["qk_rope_head_dim"], config["kv_lora_rank"]) == (16, 32)
    assert config["num_attention_heads"] == 8
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text("utf-8"))
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                assert index["weight_map"][name] == file.name
                assert tensors.get_slice(name).get_dtype() == "BF16"
    assert resolve_llm(str(out)).path == out
    tokenizers = [ModelTokenizer.load(folder).fingerprint for folder in (model, out)]
    assert tokenizers[0] == tokenizers[1]
    # K and V of two heads in three layers were 2 * 2 * 16 * 3 numbers of two bytes.
    assert report.original_bytes_per_token == 384
    assert report.converted_bytes_per_token == (16 + 32) * 3 * 2
    kept = json.loads((out / "mla_conversion.json").read_text("utf-8"))
    assert kept == report.to_json()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
