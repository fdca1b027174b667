"""Sensitivity of layers: against a mask over one pass, and its file."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import LlamaForCausalLM

from rag_eval.errors import EvalError
from rag_eval.retention import ShownModel, sensitivity
from rag_eval.retention.sensitivity import key_sensitivity, window_of
from rag_eval.retention.sensitivity_file import LayerSensitivity, read_sensitivity

IDS = [(5 * i * i + i) % 61 for i in range(90)]
SINKS, WINDOW, GROUP = 4, 20, 7


def keys_under(plain: LlamaForCausalLM, mask: torch.Tensor) -> list[torch.Tensor]:
    """Rotated keys ``[H, T, D]`` of each layer in one pass with a mask of what each token sees."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    found: list[torch.Tensor] = []

    def masked(module, args, kwargs):  # type: ignore[no-untyped-def]
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        k = module.k_proj(hidden).view(1, len(IDS), 2, -1).transpose(1, 2)
        found.append(apply_rotary_pos_emb(k, k, cos, sin)[0][0])
        bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        return args, kwargs | {"attention_mask": bias[None, None]}

    copy = deepcopy(plain)
    copy.set_attn_implementation("eager")
    for layer in copy.model.layers:
        layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True)
    with torch.no_grad():
        copy(torch.tensor([IDS]), use_cache=False)
    return found


def test_the_cut_is_the_published_mask(
    plain: LlamaForCausalLM, model: ShownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "GROUP", GROUP)
    monkeypatch.setattr(sensitivity, "_FULL_BLOCK", 32)
    row, column = torch.arange(len(IDS))[:, None], torch.arange(len(IDS))
    window = row // WINDOW
    seen = (column < SINKS) | (column >= window * WINDOW - WINDOW // 2)
    causal = column <= row
    full, cut = keys_under(plain, causal), keys_under(plain, causal & seen)
    expected = []
    for a, b in zip(full, cut, strict=True):
        cosines = [
            cosine_similarity(
                a[head, i : i + GROUP].flatten(), b[head, i : i + GROUP].flatten(), dim=0
            )
            for head in range(2)
            for first in range(0, len(IDS), WINDOW)
            for i in range(first, min(first + WINDOW, len(IDS)) - GROUP + 1, GROUP)
        ]
        expected.append(float(torch.stack(cosines).mean()))
    found = key_sensitivity(model, IDS, sinks=SINKS, window=WINDOW)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[0] == pytest.approx(1.0, abs=1e-5)  # keys of layer 0 depend on no context
    assert found[2] < 0.999


def test_a_window_of_the_whole_text_changes_nothing(model: ShownModel) -> None:
    found = key_sensitivity(model, IDS, sinks=SINKS, window=len(IDS) // 2)
    assert min(found) < 1
    with pytest.raises(EvalError, match="too short"):
        key_sensitivity(model, IDS, sinks=SINKS, window=len(IDS))
    with pytest.raises(EvalError, match="too short"):
        key_sensitivity(model, IDS)
    assert (window_of(16384), window_of(4000)) == (4096, 1000)


def test_a_file_belongs_to_its_weights(tmp_path: Path) -> None:
    made = LayerSensitivity(
        model="m", fingerprint="f", tokens=(900,), sinks=128, window=225, cosines=(1.0, 0.5)
    )
    path = tmp_path / "m.json"
    path.write_text(made.to_json())
    assert read_sensitivity(path, "f") == made
    with pytest.raises(EvalError, match="other weights"):
        read_sensitivity(path, "g")
    for text in ("", "{}", '{"format": 1}', made.to_json().replace("0.5", "7.5")):
        path.write_text(text)
        with pytest.raises(EvalError, match="cannot be read") as refused:
            read_sensitivity(path, "f")
        assert "\n" not in str(refused.value)
