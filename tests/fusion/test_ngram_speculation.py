"""NGRAM speculation on a CPU: the answers of decoding token by token, from prompts that are fused and from others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fusion_helpers import (
    CHUNKS,
    PREFIX_IDS,
    SWAPPED,
    SWAPPED_SPANS,
    attribute,
    largest_difference,
    report,
    store_chunks,
    tokens,
)

from rag_pipeline.sglang_plugin.cpu import attention_backend

NEW = 24
SETTINGS = {
    "speculative_algorithm": "NGRAM",
    "speculative_num_draft_tokens": 6,
    "speculative_ngram_max_bfs_breadth": 3,
}
SPARSE = "power:block=8+window=1+sink=0"
PROMPTS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "plain": ([*PREFIX_IDS, *tokens(30, 5)], {"mode": "off"}),
    "reuse": (SWAPPED, {"spans": SWAPPED_SPANS, "prefix_len": 20, "policy": "reuse"}),
    "query": (SWAPPED, {"spans": SWAPPED_SPANS, "prefix_len": 20, "policy": "query", "ratio": 0.4}),
    "full": (SWAPPED, {"spans": SWAPPED_SPANS, "prefix_len": 20, "policy": "full"}),
}


def _answers(local: Any) -> dict[str, Any]:
    """Each prompt alone, on the same stored chunks; all of them in one batch; then again, behind what they answered.

    Emptying the caches empties the memory of drafts, too, so that only the last find their answers in it.
    """
    store_chunks(local, CHUNKS[:2])
    found = {}
    for name, (ids, fusion) in PROMPTS.items():
        found[name] = local.ask(ids, NEW, fusion=fusion)
        local.flush()
    together = {
        name: local.submit(ids, NEW, fusion=fusion) for name, (ids, fusion) in PROMPTS.items()
    }
    local.run(*together.values())
    found |= {f"{name}, in a batch": req for name, req in together.items()}
    for name, (ids, fusion) in PROMPTS.items():
        found[f"{name}, again"] = local.ask(ids, NEW, fusion=fusion)
    # Drafted tokens read every key: here, too, where nothing is drafted.
    with attribute(attention_backend.RagCpuAttentionBackend, "gathers_positions", False):
        found["sparse"] = local.ask(tokens(141, 12), NEW, fusion={"attention": SPARSE})
    found["drawn"] = local.ask(*PROMPTS["plain"][:1], NEW, sampling_params=_cold())
    return found


def _cold() -> Any:
    """Sampling so cold that it draws the likeliest token: the path of sampling, and a known answer."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(
        temperature=1e-3, top_k=50, top_p=0.9, max_new_tokens=NEW, ignore_eos=True
    )
    params.normalize(None)
    return params


@pytest.fixture(scope="module")
def answers(_engines: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of an engine without speculation, and of one with it."""
    one_by_one = _answers(_engines("llama"))
    local = _engines("llama", **SETTINGS)
    assert local.runtime.off_reason == ""
    assert local.runtime.self_check.startswith("passed")
    return one_by_one, _answers(local)


def test_answers_are_those_of_decoding_token_by_token(
    answers: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    one_by_one, speculated = answers
    for name, req in speculated.items():
        assert len(req.output_ids) == NEW, name
        assert list(req.output_ids) == list(one_by_one[name].output_ids), name
        if name != "drawn":  # its log-probabilities are those of other temperatures
            assert largest_difference(req, one_by_one[name]) < 5e-4, name


def test_prompts_are_fused_as_without_speculation(
    answers: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    one_by_one, speculated = answers
    for name in ("reuse", "query", "full"):
        wanted, got = report(one_by_one[name]), report(speculated[name])
        assert got["reused_tokens"] == wanted["reused_tokens"], name
        assert got.get("fallback", "") == "", name
    assert report(speculated["reuse"])["reused_tokens"] > 0


def test_drafts_are_accepted(answers: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Otherwise nothing of the tree was ever used. What a policy chose anew may have another answer than before."""
    _, speculated = answers
    for name in ("plain, again", "reuse, again"):
        assert speculated[name].spec_verify_ct < (NEW - 1) / 2, name


def test_a_sparse_method_acts_on_the_prompt_and_not_on_drafts(
    answers: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """The whole answer is that of a prompt of the method behind which every key is read; compared above."""
    for both in answers:
        assert report(both["sparse"])["attention"] == SPARSE
