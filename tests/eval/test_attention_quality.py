"""Attention methods at equal density: mass that is kept, options that are found, documents, and a model in torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from rag_eval.benchmarks import attention_mass, attention_quality
from rag_eval.benchmarks.attention_density import KNOBS, TOLERANCE, brought_to
from rag_eval.benchmarks.attention_mass import CELL, MassGrid, density_of
from rag_eval.benchmarks.attention_model import MethodModel, blocks_of
from rag_eval.benchmarks.attention_prompts import KINDS, UNIT, Document, make_document
from rag_eval.benchmarks.attention_quality import AttentionQualityConfig, main
from rag_eval.benchmarks.attention_seen import SeenAttention
from rag_eval.errors import EvalError
from rag_eval.runner.prompts import PromptMaker
from rag_kernels import ATTENTION_METHODS, create_attention_method, plan_position_causal
from rag_kernels.attention.base import AttentionCall
from rag_kernels.attention.mask import RequestBlocks
from rag_pipeline.models import fingerprint_checkpoint


def call_of(tokens: int, heads: int = 4, kv_heads: int = 2) -> AttentionCall:
    torch.manual_seed(5)
    plan = plan_position_causal(
        [torch.arange(tokens)],
        [torch.arange(tokens)],
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=16,
    )
    q, k, v = (torch.randn(tokens, n, 16) for n in (heads, kv_heads, kv_heads))
    return AttentionCall(q_RNH=2 * q, k_pool=k, v_pool=v, plan=plan, scale=0.25)


# -- mass and density ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [64, 330])
@pytest.mark.parametrize("blocks", [(32, 32), (64, 32), (64, 64), (128, 128)])
def test_mass_and_density_are_those_of_the_keys_that_rows_read(tokens, blocks):
    query_block, key_block = blocks
    call = call_of(tokens)
    shape = (4, -(-tokens // query_block), -(-tokens // key_block))
    mask = RequestBlocks(
        allowed=torch.rand(shape) < 0.5, query_block=query_block, key_block=key_block
    )
    at = torch.arange(tokens)
    read = mask.rows(at).repeat_interleave(key_block, dim=2)[..., :tokens].tril()
    keys = call.k_pool.repeat_interleave(2, dim=1)
    logits = torch.einsum("ihd,jhd->hij", call.q_RNH, keys) * call.scale
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    looked_at = slice(attention_mass._EVERY - 1, None, attention_mass._EVERY)
    kept = MassGrid(call.q_RNH, call.k_pool, call.scale).kept(mask)
    wanted = (weights * read).sum(-1)[:, looked_at].mean(-1)
    torch.testing.assert_close(kept.recall.float(), wanted, atol=1e-5, rtol=1e-5)
    assert density_of([kept]) == pytest.approx(
        mask.keys_read(at) / (tokens * (tokens + 1) / 2), rel=1e-6
    )


def test_everything_has_all_of_the_mass_and_blocks_within_a_cell_are_refused():
    call = call_of(100)
    grid = MassGrid(call.q_RNH, call.k_pool, call.scale)
    everything = grid.kept(None)
    torch.testing.assert_close(everything.recall, torch.ones(4).double(), atol=1e-6, rtol=0)
    assert density_of([everything]) == 1
    with pytest.raises(ValueError, match="multiples"):
        grid.kept(blocks_of(create_attention_method(f"streaming:block={CELL // 2}"), 0, call))


# -- one density --------------------------------------------------------------------------------


def test_every_method_that_is_shipped_has_a_knob():
    assert set(KNOBS) == set(ATTENTION_METHODS.names()) - {"dense"}


@pytest.mark.parametrize("name", [name for name in KNOBS if name != "sale"])
def test_a_baseline_is_given_at_least_the_density(name):
    call = call_of(2048)
    grid = MassGrid(call.q_RNH, call.k_pool, call.scale)
    block = "" if name in ("xattention", "vertical_slash", "block_topk") else ":block=64"

    def density(text: str) -> float:
        return density_of([grid.kept(blocks_of(create_attention_method(text), 0, call))])

    found = brought_to(name + block, 0.4, 2048, density)
    reached = density(found)
    if KNOBS[name].is_whole:
        assert reached >= 0.4
        option = KNOBS[name].option
        value = int(found.partition(f"{option}=")[2].partition("+")[0])
        less = found.replace(f"{option}={value}", f"{option}={value - 1}")
        assert value == 1 or density(less.replace(f"slash={value}", f"slash={value - 1}")) < 0.4
    else:
        assert 0.4 <= reached <= 0.4 + 3 * TOLERANCE


def test_sale_is_given_at_most_the_density():
    """Here with a density that falls with the threshold as it does on a real prompt."""
    asked = []

    def density(text: str) -> float:
        asked.append(text)
        return 1 / (1 + 40 * float(text.partition("thresholds=")[2]) ** 0.5)

    found = brought_to("sale:block_q=64", 0.3, 4096, density)
    assert found.startswith("sale:block_q=64+thresholds=")
    assert 0.3 - TOLERANCE <= density(found) <= 0.3
    assert len(asked) < 12


def test_a_method_that_names_its_option_is_left_alone_and_an_unknown_one_refused():
    def never(text: str) -> float:
        raise AssertionError(text)

    for text in ("dense", "sale:thresholds=auto", "power:window=3+block=64"):
        assert brought_to(text, 0.3, 4096, never) == text
    with pytest.raises(EvalError, match="sets the density of 'mine' is not known"):
        brought_to("mine", 0.3, 4096, never)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--density", "0"], "density is '0'; give numbers between 0 and 1"),
        (["--density", "much"], "density is 'much'"),
        (["--density", "0.3,0.2"], "2 densities for 1 lengths"),
        (["--lengths", "1024"], "lengths is '1024'; give numbers from 1280 on"),
        (["--methods", "nonesuch"], "nonesuch"),
        (["--questions", "0"], "questions"),
    ],
)
def test_a_bad_option_is_one_line(words: list[str], message: str, refusal: Callable[..., str]):
    assert message in refusal(main, words)


# -- documents ----------------------------------------------------------------------------------


def texts_of(document: Document) -> list[str]:
    return [bytes(question.answer).decode().strip() for question in document.questions]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_holds_each_answer_once_and_no_question_does(kind):
    def encode(text: str) -> list[int]:
        return list(text.encode())

    document = make_document(kind, 6000, 8, encode, "1")
    assert len(document.ids) % UNIT == 0
    answers = texts_of(document)
    assert len(set(answers)) == 8
    for question, answer in zip(document.questions, answers, strict=True):
        whole = bytes([*document.ids, *question.ids]).decode()
        assert whole.count(answer) == 1
        assert len(answer) == 7
        assert len(whole) + len(question.answer) <= 6000
        assert answer not in bytes(question.ids).decode().partition("\n\n")[2]
    depths = [question.depth for question in document.questions]
    assert all(low < high for low, high in pairwise(depths))
    assert depths[0] < 0.2
    assert depths[-1] > 0.8
    assert make_document(kind, 6000, 8, encode, "1") == document
    assert make_document(kind, 6000, 8, encode, "2").ids != document.ids
    with pytest.raises(EvalError, match="ask for fewer"):
        make_document(kind, 700, 50, encode, "1")


# -- a model in torch ---------------------------------------------------------------------------


def test_a_pattern_in_torch_is_that_of_a_mask_written_out(tiny_path: Path):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(50, 50 + 3 * 64)
    method = create_attention_method("streaming:block=32+window=2")
    model = MethodModel(tiny_path)
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_path, dtype="auto", attn_implementation="sdpa"
    ).eval()
    block = torch.arange(len(ids)) // 32
    distance = block[:, None] - block[None]
    mask = ((distance < 2) | (block[None] < 1)).tril()[None, None]
    for used, given in ((None, None), (method, mask)):
        with torch.inference_mode():
            wanted = plain.model(ids[None], attention_mask=given, use_cache=False)
        hidden, _ = model.prefill(ids.tolist(), used)
        torch.testing.assert_close(hidden, wanted.last_hidden_state[0], atol=2e-3, rtol=2e-3)
    dense, _ = model.prefill(ids.tolist())
    assert float((dense - hidden).abs().max()) > 0.01


def test_a_question_is_a_piece_behind_its_document_and_the_answer_reads_everything(
    tiny_path: Path,
):
    ids = list(range(40, 40 + 160))
    model = MethodModel(tiny_path)
    method = create_attention_method("streaming:block=32+window=1+sink=0")
    _, cache = model.prefill(ids[:128], method)
    answer = [7, 8, 9]
    first = model.ask(ids[128:], answer, cache, method)
    assert model.ask(ids[128:], answer, cache, method) == first  # the cache is as it was
    whole, behind = model.prefill(ids, method)
    rows = torch.cat((whole[-1:], model._pass(answer[:-1], None, behind)))
    loss = float(model.losses(rows, answer).mean())
    assert first[1] == pytest.approx(loss, abs=1e-3)
    greedy = [int(model._logits(rows)[0].argmax())]
    assert model.ask(ids[128:], greedy, cache, method)[0]
    assert not first[0]


# -- S5 and S7: SALE on a real model -----------------------------------------------------------


EARLY = "min_tokens=128+local_window=64+segment=64"
"""Rows behind the first 128 choose: by default a prompt as short as this is read as a whole."""


@pytest.fixture(scope="module")
def real(smollm2_path: Path) -> Any:
    """The packaged model, a document with passkeys, and its attention in every fifth layer."""
    torch.set_num_threads(1)
    model = MethodModel(smollm2_path)
    maker = PromptMaker(smollm2_path, gold_tokens=16)
    document = make_document("passkey", 1000, 4, maker.encode, "a")
    return model, document, fingerprint_checkpoint(smollm2_path)


def test_sale_keeps_more_mass_than_every_baseline_at_equal_density(real):
    model, document, fingerprint = real
    calls: list[tuple[int, AttentionCall]] = []

    def see(layer: int, call: AttentionCall) -> None:
        if layer % 6 == 3:
            calls.append((layer, call))

    model.prefill(document.ids, see=see)
    grids = [MassGrid(call.q_RNH, call.k_pool, call.scale) for _, call in calls]

    def kept(text: str) -> list[Any]:
        method = create_attention_method(text).for_model(fingerprint)
        return [grid.kept(blocks_of(method, *at)) for at, grid in zip(calls, grids, strict=True)]

    def recall(text: str) -> float:
        return float(torch.stack([part.recall for part in kept(text)]).mean())

    def density(text: str) -> float:
        return density_of(kept(text))

    sale = brought_to(f"sale:{EARLY}", 0.4, len(document.ids), density)
    assert density(sale) <= 0.4
    lost = {
        name: 1 - recall(brought_to(name, density(sale), len(document.ids), density))
        for name in (
            "block_topk",
            "xattention:block=64",
            "vertical_slash",
            "streaming:block=32",
            "power:block=32",
        )
    }
    own = 1 - recall(sale)
    assert own < min(lost.values()), (own, lost)
    exact = brought_to(f"sale:{EARLY}+estimate=exact", density(sale), len(document.ids), density)
    assert own < 1.1 * (1 - recall(exact))


def test_sale_finds_the_passkeys_that_dense_attention_finds(real):
    """A window alone does not: the questions can tell."""
    model, document, fingerprint = real
    window = "streaming:block=64+window=2"
    right, loss = {}, {}
    for name in ("dense", f"sale:{EARLY}", window):
        method = None if name == "dense" else create_attention_method(name).for_model(fingerprint)
        _, cache = model.prefill(document.ids, method)
        asked = [model.ask(one.ids, one.answer, cache, method) for one in document.questions]
        right[name] = [is_right for is_right, _ in asked]
        loss[name] = sum(found for _, found in asked) / len(asked)
    dense, sale, near = right.values()
    assert sum(dense) >= 2  # 2 or 3 as a machine's kernels round
    assert all(found >= wanted for found, wanted in zip(sale, dense, strict=True))
    assert sum(near) < 2
    own, base, worst = loss[f"sale:{EARLY}"], loss["dense"], loss[window]
    assert own - base < 0.2 * (worst - base)


# -- the whole ----------------------------------------------------------------------------------


def test_the_report_of_a_small_run(tiny_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--model", str(tiny_path), "--lengths", "1408", "--density", "0.6"]
    words += ["--documents", "1", "--questions", "2", "--methods", "streaming:block=64,sale,dense"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["lengths"]["1408"]
    assert list(rows) == ["dense", "streaming:block=64", "sale"]
    assert rows["dense"]["nll_delta_interval"] == [0.0, 0.0]
    sparse = rows["streaming:block=64"]
    assert sparse["density"] >= 0.6 > sparse["recall_worst"] * 0.6
    assert sparse["nll_n"] > 20
    assert sparse["retrieval_n"] == 4
    assert sparse["options"] == f"streaming:block=64+window={sparse['options'][-1]}"
    low, high = sparse["nll_delta_interval"]
    assert low <= sparse["nll_delta"] <= high
    lines = attention_quality.table(report).splitlines()
    assert len(lines) == 4
    assert lines[1].split()[1] == "dense"


def test_methods_as_they_are_on_one_kind_of_documents(tiny_path: Path):
    config = AttentionQualityConfig(
        model=str(tiny_path),
        lengths="1408",
        density="",
        kinds="key_value",
        documents=1,
        questions=2,
        methods="streaming:block=64+window=2",
    )
    report = attention_quality.run(config)
    dense, sparse = report["lengths"]["1408"].values()
    assert sparse["options"] == "streaming:block=64+window=2"
    assert (dense["density"], dense["attention_cpu_vs_dense"]) == (1, 1)
    assert 0 < sparse["density"] < 0.4
    assert 0 < sparse["attention_cpu_s"] < sparse["prefill_cpu_s"]
    assert sparse["retrieval_n"] == sparse["key_value_n"] == 2
    assert {"nll", "passkey", "recall"}.isdisjoint(sparse)
    assert attention_quality.table(report).splitlines()[2].split()[7:11] == ["-", "-", "0%", "-"]
    with pytest.raises(EvalError, match="give some of key_value,passkey"):
        dataclasses.replace(config, kinds="prose")


def test_a_run_that_is_broken_off_keeps_the_methods_that_were_done(tiny_path: Path, interrupt_at):
    config = AttentionQualityConfig(
        model=str(tiny_path),
        lengths="1408",
        density="0.6",
        documents=1,
        questions=1,
        methods="streaming:block=64,power:block=64",
    )
    report = attention_quality.run(config, interrupt_at("power:block=64+window=1, document 1"))
    assert report["interrupted"] or len(report["lengths"]["1408"]) == 3
    assert {"dense", "streaming:block=64"} <= set(report["lengths"]["1408"])


def test_attention_that_was_seen_tells_prompts_apart(tiny_path: Path):
    model = MethodModel(tiny_path)
    seen = SeenAttention(model, "", {"one": range(40, 424), "two": range(300, 812)})
    report = seen.report("streaming:block=64+window=2")
    assert report["density_one"] > report["density"] > report["density_two"]
    assert report["recall_heads"] == 16
    assert report["recall_worst"] <= report["recall"] <= 1
