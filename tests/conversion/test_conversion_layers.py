"""The original in plain torch is the original: against transformers, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rag_pipeline.conversion import ConversionError
from rag_pipeline.conversion.layers import attend, network, rms_norm, rotate, rotations
from rag_pipeline.conversion.source import SourceWeights, read_shape


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_layers_are_those_of_transformers(llama: Callable[..., Path], heads: int) -> None:
    from transformers import AutoModelForCausalLM

    folder = llama(num_key_value_heads=heads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shape, weights = read_shape(folder), SourceWeights(folder)
    ids = torch.arange(100, 137)
    with torch.inference_mode():
        wanted = model(ids[None], output_hidden_states=True).hidden_states
        stream = weights.embedding()[ids]
        turn = rotations(len(ids), shape.frequencies)
        for index in range(shape.layers):
            torch.testing.assert_close(stream, wanted[index][0], rtol=1e-4, atol=1e-4)
            layer = weights.layer(index)
            seen = attend(layer, rms_norm(stream, layer.attention_norm, shape.eps), shape, turn)
            stream = stream + seen.heads_out @ layer.o.T
            stream = stream + network(layer, stream, shape.eps, torch.float32)
        final = rms_norm(stream, weights.tensor("model.norm.weight"), shape.eps)
    torch.testing.assert_close(final, wanted[-1][0], rtol=1e-4, atol=1e-4)


def test_several_heads_turn_as_each_alone() -> None:
    x = torch.randn(7, 2 * 10)
    turn = rotations(7, torch.rand(5))
    together = rotate(x, turn)
    apart = torch.cat([rotate(part, turn) for part in x.chunk(2, -1)], -1)
    torch.testing.assert_close(together, apart)


FAMILIES = {
    "qwen2": "biases",
    "qwen3": "normalised per head",
    "gemma2": "windows",
    "mixtral": "layers that the conversion knows",
    "deepseek_v2": "already",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_another_family_is_refused_by_name_and_reason(
    llama: Callable[..., Path], family: str
) -> None:
    with pytest.raises(ConversionError, match=f"family {family} .*{FAMILIES[family]}"):
        read_shape(llama(family=family))


def test_a_mistral_without_a_window_is_read(llama: Callable[..., Path]) -> None:
    assert read_shape(llama(family="mistral")).kv_heads == 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"attention_bias": True}, "attention has biases"),
        ({"mlp_bias": True}, "network has biases"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "type linear",
        ),
    ],
)
def test_a_llama_that_deepseek_cannot_express_is_refused(
    llama: Callable[..., Path], fields: dict[str, object], named: str
) -> None:
    with pytest.raises(ConversionError, match=named):
        read_shape(llama(**fields))


def test_the_base_of_rope_may_stand_beside_its_parameters(
    tmp_path: Path, llama: Callable[..., Path]
) -> None:
    """transformers reads it there too; another base would turn keys otherwise than the model was trained with."""
    from transformers import AutoConfig

    given = json.loads((llama() / "config.json").read_text("utf-8"))
    given |= {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}
    (tmp_path / "config.json").write_text(json.dumps(given), "utf-8")
    assert read_shape(tmp_path).theta == 5e5
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 5e5


def test_a_folder_without_weights_or_with_a_missing_one_is_refused(
    tmp_path: Path, llama: Callable[..., Path]
) -> None:
    with pytest.raises(ConversionError, match=r"no \*\.safetensors"):
        SourceWeights(tmp_path)
    with pytest.raises(ConversionError, match="no weight nothing"):
        SourceWeights(llama()).tensor("nothing")
    with pytest.raises(ConversionError, match=r"no readable config\.json"):
        read_shape(tmp_path)
