"""Attention methods in prefill: what is refused, the prompts, how runs are compared, and what is kept of one that ends early."""

from __future__ import annotations

import functools

import pytest

from rag_eval.benchmarks import prefill_methods
from rag_eval.benchmarks.prefill_methods_config import (
    PrefillMethodsConfig,
    make_retrievals,
    make_texts,
)
from rag_eval.benchmarks.prefill_methods_length import Losses, PrefillRun, loss_row, speed_row
from rag_eval.errors import EvalError
from rag_eval.metrics import answer_nll, log_softmax
from rag_eval.runner.prompts import PromptMaker
from rag_kernels import ATTENTION_METHODS
from rag_pipeline.protocol import LEFT_ALONE


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
        return PrefillRun(
            wall_s=wall_s, cpu_s=1.0, attention_s=attention_s, mask_s=mask_s, density=density
        )

    dense = [made(2.0, 1.0, 0.0, 1.0), made(4.0, 2.0, 0.0, 1.0), made(2.0, 1.0, 0.0, 1.0)]
    runs = [made(1.0, 0.5, 0.1, 0.2), made(2.0, 1.0, 0.2, 0.2), made(4.0, 3.0, 0.1, 0.3)]
    told = speed_row(runs, dense)
    # Against the median of all dense runs the busy second round would count twice.
    assert (told["attention_vs_dense"], told["attention_vs_dense_range"]) == (0.5, [0.5, 3.0])
    assert (told["prefill_vs_dense"], told["prefill_vs_dense_range"]) == (0.5, [0.5, 2.0])
    assert (told["estimation_vs_dense"], told["density"], told["n"]) == (0.1, 0.2, 3)
    losses = loss_row(
        Losses(nll=[2.2, 4.4], right=[True, False], found=[1.0, 3.0]),
        Losses(nll=[2.0, 4.0], right=[True, True], found=[1.0, 1.0]),
    )
    assert (losses["nll_delta"], losses["nll_delta_each"]) == (0.1, [0.1, 0.1])
    assert (losses["retrieval"], losses["retrieval_nll"]) == (0.5, 2.0)
    assert losses["nll_delta_interval"] == pytest.approx([0.2 / 3, 0.4 / 3], abs=1e-4)
    low, high = losses["retrieval_delta_interval"]
    assert low <= -0.5 <= high
    report = {"lengths": {"512": {"sale": told | losses, "power": told}}}
    lines = prefill_methods.table(report).splitlines()
    assert "50%" in lines[1]
    assert lines[2].split()[6:8] == ["-", "-"]  # of this one nothing but the speed was measured


def test_losses_are_those_of_what_both_went_through():
    whole = Losses(nll=[2.0, 4.0], right=[True, True], found=[1.0, 1.0])
    half = loss_row(Losses(nll=[3.0]), whole)
    assert (half["nll_delta"], half["nll_n"]) == (0.5, 1)
    assert "retrieval" not in half
    asked = loss_row(Losses(nll=[3.0, 6.0], right=[False, True], found=[2.0]), whole)
    assert (asked["nll_n"], asked["retrieval"], asked["retrieval_n"]) == (2, 0.0, 1)
    assert loss_row(Losses(), whole) == {}


@pytest.fixture
def small_run(tiny_session, tiny_path):
    """Two methods at two lengths, in the shared engine."""
    config = PrefillMethodsConfig(
        model=str(tiny_path),
        methods="streaming:block=32+window=2",
        lengths="320,256",
        repeats=1,
        texts=2,
        nll_tokens=8,
        retrievals=1,
    )
    return functools.partial(prefill_methods.run, config, session=tiny_session)


@pytest.mark.engine
def test_methods_are_measured_side_by_side_in_one_engine(small_run, tiny_session, tiny_path):
    report = small_run()
    assert report["interrupted"] is False
    assert "failure" not in report
    assert list(report["lengths"]) == ["256", "320"]
    for rows in report["lengths"].values():
        dense, sparse = rows["dense"], rows["streaming:block=32+window=2"]
        assert (dense["attention_vs_dense"], dense["nll_delta"], dense["density"]) == (1, 0, 1)
        assert 0 < sparse["density"] < 0.9
        assert sparse["nll_delta"] != 0
        assert (sparse["n"], sparse["nll_n"], sparse["retrieval_n"]) == (1, 2, 1)
    # The first text is followed behind the prompt that was timed; a prefill of its own says the same.
    for name, request in (
        ("dense", LEFT_ALONE),
        (
            "streaming:block=32+window=2",
            PrefillMethodsConfig.request("streaming:block=32+window=2"),
        ),
    ):
        alone = []
        for prompt, following in make_texts(PromptMaker(tiny_path, gold_tokens=16), 2, 256, 8, 0):
            tiny_session.flush()
            logits, _ = tiny_session.force(prompt, following, request)
            alone.append(answer_nll(log_softmax(logits), following))
        assert report["lengths"]["256"][name]["nll"] == pytest.approx(sum(alone) / 2, abs=2e-4)


@pytest.mark.engine
def test_a_run_that_is_broken_off_keeps_every_method_and_length(small_run, interrupt_at):
    first = small_run(interrupt_at("320 tokens, dense: warmed up"))
    assert first["interrupted"] is True
    assert list(first["lengths"]) == ["256"]
    assert len(first["lengths"]["256"]) == 2
    # Speed is known of both methods, the loss of the first text too, the rest of one only.
    second = small_run(interrupt_at("256 tokens, dense: NLL"))
    rows = second["lengths"]["256"].values()
    assert [row["nll_n"] for row in rows] == [2, 1]
    assert ["retrieval" in row for row in rows] == [True, False]
    assert len(prefill_methods.table(second).splitlines()) == 3
    with pytest.raises(KeyboardInterrupt):
        small_run(interrupt_at("256 tokens, dense: warmed up"))
    # Dense comes first: with its prefill there is a report.
    third = small_run(interrupt_at("256 tokens, dense: 0."))
    assert [row["n"] for row in third["lengths"]["256"].values()] == [1]


@pytest.mark.engine
def test_a_run_that_fails_at_one_length_keeps_the_others(small_run):
    def fails(line):
        if line.startswith("320 tokens"):
            raise EvalError("the engine has had enough")

    report = small_run(fails)
    assert (report["failure"], report["interrupted"]) == ("the engine has had enough", False)
    assert list(report["lengths"]) == ["256"]
