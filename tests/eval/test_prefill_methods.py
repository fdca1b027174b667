"""Attention methods in prefill: what is refused, the prompts, and how runs are compared; no engine."""

from __future__ import annotations

import pytest

from rag_eval.benchmarks import prefill_methods
from rag_eval.benchmarks.prefill_methods_config import (
    PrefillMethodsConfig,
    make_retrievals,
    make_texts,
)
from rag_eval.errors import EvalError
from rag_eval.runner.prompts import PromptMaker
from rag_kernels import ATTENTION_METHODS


@pytest.mark.parametrize("lengths", ["", "128", "4096,many", "-4096"])
def test_lengths_that_are_none_are_one_line(lengths):
    with pytest.raises(EvalError, match="give numbers from 256 on"):
        PrefillMethodsConfig(methods="dense", lengths=lengths)


def test_an_unknown_method_is_refused_before_an_engine_is_started():
    with pytest.raises(ValueError, match="nonesuch"):
        PrefillMethodsConfig(methods="dense,nonesuch")


def test_dense_comes_first_and_each_method_once():
    others = [name for name in ("streaming", "power") if name in ATTENTION_METHODS.names()]
    named = ", ".join([*others, "dense", *others])
    config = PrefillMethodsConfig(methods=named, lengths="1024,512,512")
    assert config.method_names == ["dense", *others]
    assert config.length_list == [512, 1024]
    assert [config.request(name).attention or "dense" for name in config.method_names] == [
        "dense",
        *others,
    ]


def test_texts_are_as_long_as_asked_for_and_retrievals_not_longer(smollm2_path):
    maker = PromptMaker(smollm2_path, gold_tokens=16)
    texts = make_texts(maker, 2, 512, 64, seed=0)
    assert [(len(prompt), len(following)) for prompt, following in texts] == [(512, 64)] * 2
    assert texts[0] != texts[1]
    assert texts == make_texts(maker, 2, 512, 64, seed=0)
    asked = make_retrievals(maker, 2, 512, seed=0)
    assert len(asked) == 2
    assert all(256 < len(one.input_ids) <= 512 for one in asked)
    assert make_retrievals(maker, 0, 512, seed=0) == []


def test_a_density_is_one_for_all_lengths_or_one_for_each():
    def densities(lengths, density):
        config = PrefillMethodsConfig(methods="sale", lengths=lengths, density=density)
        return config.density_of_length

    assert densities("4096,2048", "") == {2048: 0.0, 4096: 0.0}
    assert densities("4096,2048", "0.3") == {2048: 0.3, 4096: 0.3}
    assert densities("4096,2048", "0.3,0.5") == {2048: 0.5, 4096: 0.3}
    with pytest.raises(EvalError, match="give numbers from 1280 on"):
        densities("512", "0.3")
    with pytest.raises(EvalError, match="2 densities for 1 lengths"):
        densities("2048", "0.3,0.5")


def test_methods_are_brought_to_one_density_before_an_engine_is_there(tiny_path):
    """The options of the report are what the engine is asked for, and what torch found."""
    config = PrefillMethodsConfig(
        model=str(tiny_path),
        methods="streaming:block=64,power:block=64+window=2",
        lengths="1408",
        density="0.5",
        retrievals=1,
    )
    maker = PromptMaker(tiny_path, gold_tokens=16)
    told = prefill_methods._bring_to_density(config, tiny_path, maker, lambda line: None)[1408]
    assert list(told) == config.method_names
    assert told["dense"] == {"options": "dense"}
    assert told["power:block=64+window=2"]["options"] == "power:block=64+window=2"
    found = told["streaming:block=64"]
    assert 0.5 <= found["density"] < 0.6
    assert 0 < found["recall_worst"] <= found["recall"] < 1
    request = config.request(found["options"])
    assert request.attention.startswith("streaming:block=64+window=")


def test_runs_are_compared_within_their_round():
    def made(wall_s, attention_s, mask_s, density):
        return prefill_methods._Run(
            wall_s=wall_s, cpu_s=1.0, attention_s=attention_s, mask_s=mask_s, density=density
        )

    dense = [made(2.0, 1.0, 0.0, 1.0), made(4.0, 2.0, 0.0, 1.0), made(2.0, 1.0, 0.0, 1.0)]
    runs = [made(1.0, 0.5, 0.1, 0.2), made(2.0, 1.0, 0.2, 0.2), made(4.0, 3.0, 0.1, 0.3)]
    told = prefill_methods._summary(runs, dense)
    # Against the median of all dense runs the busy second round would count twice.
    assert (told["attention_vs_dense"], told["attention_vs_dense_range"]) == (0.5, [0.5, 3.0])
    assert (told["prefill_vs_dense"], told["prefill_vs_dense_range"]) == (0.5, [0.5, 2.0])
    assert (told["estimation_vs_dense"], told["density"], told["n"]) == (0.1, 0.2, 3)
    losses = prefill_methods._losses(
        [2.2, 4.4], [2.0, 4.0], [True, False], [True, True], [1.0, 3.0], [1.0, 1.0]
    )
    assert (losses["nll_delta"], losses["nll_delta_each"]) == (0.1, [0.1, 0.1])
    assert (losses["retrieval"], losses["retrieval_nll"]) == (0.5, 2.0)
    assert losses["nll_delta_interval"] == pytest.approx([0.2 / 3, 0.4 / 3], abs=1e-4)
    low, high = losses["retrieval_delta_interval"]
    assert low <= -0.5 <= high
    report = {"lengths": {"512": {"sale": told | losses}}}
    assert "50%" in prefill_methods.table(report).splitlines()[1]
    without = prefill_methods._losses([2.0], [2.0], [], [], [], [])
    assert "retrieval" not in without
