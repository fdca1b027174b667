"""Whether latents are sliced is said by the environment; where it says nothing, SGLang is left alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rag_kernels.latent import BASES
from rag_pipeline.config import HOME_VARIABLE
from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.hook_table import hooked_targets, targets, verify_targets
from rag_pipeline.sglang_plugin.tpla import choice, loading


def test_the_basis_is_one_of_the_known_ones_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choice.TPLA, raising=False)
    assert choice.chosen_basis() is None
    for off in ("", "off", " off "):
        monkeypatch.setenv(choice.TPLA, off)
        assert choice.chosen_basis() is None
    for name in BASES:
        monkeypatch.setenv(choice.TPLA, name)
        assert choice.chosen_basis() == name
    monkeypatch.setenv(choice.TPLA, "svd")
    with pytest.raises(EngineError, match="RAG_PIPELINE_TPLA is 'svd'; allowed are 'off'"):
        choice.chosen_basis()


def test_statistics_are_looked_for_by_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(choice.STATISTICS, raising=False)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    assert choice.statistics_file("ab12") == tmp_path / "tpla" / "ab12.safetensors"
    monkeypatch.setenv(choice.STATISTICS, str(tmp_path / "own"))
    assert choice.statistics_file("ab12") == tmp_path / "own"


def test_off_hooks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.TPLA, "off")
    before = targets()
    loading.register()
    assert targets() == before
    assert not any("TPLA" in row.why for row in hooked_targets())


@pytest.mark.parametrize("part", ["prefill_attention_backend", "decode_attention_backend"])
def test_another_backend_for_prompts_or_for_decoding_is_refused(part: str) -> None:
    """Both are served by one backend: the other one knows no slices of latents, and would fail at the first prompt."""
    import sglang.srt.server_args  # noqa: F401  # first: it imports the platforms, and they the backend's name

    own = dict.fromkeys(("prefill_attention_backend", "decode_attention_backend"))
    told = {}
    for value in ("rag_cpu", "torch_native"):
        args = SimpleNamespace(**own | {"attention_backend": None, "tp_size": 1, part: value})
        runner = SimpleNamespace(server_args=args, use_mla_backend=True, device="cpu")
        told[value] = loading._refusal(runner, [object()])
    assert told["rag_cpu"].startswith("one rank")
    assert told["torch_native"].startswith("attention by 'torch_native'")


def test_what_it_relies_on_is_in_the_installed_sglang() -> None:
    verify_targets(loading.TARGETS)
