"""The toy comparison of static patterns, their cost untrained, and the order of documents: small runs."""

from __future__ import annotations

import json

import pytest
import torch
from fp64_oracle import Oracle

from rag_eval.benchmarks import power_nll, power_order, power_passkey, power_toy
from rag_eval.benchmarks.masked_model import MaskedModel
from rag_eval.benchmarks.power_toy import PowerToyConfig, ToyModel, draw_prompts, reachable
from rag_eval.benchmarks.tiny_model import write_tiny_model
from rag_eval.errors import EvalError
from rag_kernels import create_attention_method
from rag_pipeline.prompts import ModelTokenizer

TINY = PowerToyConfig(
    patterns="power:window=1+sink=0,streaming:window=2+sink=0,dense",
    blocks=12,
    block_tokens=2,
    layers=2,
    width=16,
    heads=2,
    steps=3,
    batch=4,
    seeds=2,
    tested=60,
)


def read_by(text, blocks=12):
    return power_toy._blocks_read(text, blocks)


@pytest.mark.parametrize("name", TINY.names)
def test_a_toy_token_feels_a_passkey_if_and_only_if_its_block_is_reachable(name):
    torch.manual_seed(1)
    model = ToyModel(TINY, read_by(name)).double()
    ids, keys, places = draw_prompts(TINY, 40, torch.Generator().manual_seed(2))
    other = ids.clone()
    other[torch.arange(40), places] = 16 + (keys + 1) % 16
    with torch.inference_mode():
        feels = (model(ids) != model(other)).any(-1)
    reaches = reachable(read_by(name), TINY.layers)
    row = torch.arange(24)
    for index, place in enumerate(places.tolist()):
        want = reaches[row // 2, place // 2] & (row >= place)
        assert torch.equal(feels[index], want)


def test_passkeys_stand_between_the_first_and_the_last_block_and_nowhere_else():
    ids, keys, places = draw_prompts(TINY, 300, torch.Generator().manual_seed(3))
    assert set((places // 2).tolist()) == set(range(1, 11))
    assert ((ids >= 16).sum(dim=1) == 1).all()
    assert torch.equal(ids[torch.arange(300), places], 16 + keys)


def test_a_model_that_sees_all_learns_and_accuracy_is_counted_by_pair():
    config = PowerToyConfig(
        patterns="dense", blocks=6, layers=1, width=32, heads=2, steps=250, batch=16, tested=400
    )
    model = power_toy.train(config, read_by("dense", 6), 0, lambda text: None)
    pairs = power_toy.accuracy_by_pair(config, model, 0)
    asked = ~pairs.isnan()
    assert torch.equal(asked, torch.ones(6, 6).tril(-1).bool() & (torch.arange(6) > 0)[None])
    assert float(pairs[asked].min()) > 0.9


def test_a_run_and_its_table(capsys):
    report = power_toy.run(TINY)
    power = report["patterns"]["power:window=1+sink=0"]
    assert (power["blocks_last_row"], power["accuracy"]["n"]) == (5, 2)  # 0, 1, 2, 4 and 8
    assert report["patterns"]["dense"]["reachable"] == 1.0
    assert report["patterns"]["dense"]["accuracy_unreachable"] is None
    assert 0 < report["patterns"]["streaming:window=2+sink=0"]["reachable"] < power["reachable"]
    text = power_toy.table(json.loads(json.dumps(report)))
    assert "12 blocks of 2 tokens" in text
    assert text.count("streaming:window=2+sink=0") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 15}, "width is 15; it must be a multiple of heads, 2"),
        ({"blocks": 2}, "blocks"),
        ({"patterns": "power,far"}, "'far' is not known"),
        ({"patterns": "block_topk"}, "chooses by the prompt; give patterns that are static"),
    ],
)
def test_what_cannot_be_compared_is_refused(fields, message):
    with pytest.raises(EvalError, match=message):
        PowerToyConfig(**fields)


def test_the_order_benchmark(capsys):
    assert power_order.main(["--json", "--prompts", "3", "--documents", "4,9"]) == 0
    report = json.loads(capsys.readouterr().out)
    for orders in report["documents"].values():
        placed, best_last = orders["placed"]["one_hop"], orders["best_last"]["one_hop"]
        assert 1 >= placed["mean"] >= best_last["mean"] - 0.3
        assert placed["n"] == 3
    assert "of the best 4 documents, by 'power'" in power_order.table(report)
    for fields, message in (
        ({"documents": "2"}, "best is 4 of 2 documents"),
        ({"documents": "a"}, "invalid literal"),
        ({"method": "xattention"}, "chooses by the prompt"),
        ({"longest": 5}, "longest is 5"),
    ):
        with pytest.raises(EvalError, match=message):
            power_order.PowerOrderConfig(**fields)


@pytest.fixture(scope="module")
def tiny_folder(smollm2_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-nll")
    return write_tiny_model(folder, smollm2_path, layers=3, peaked=True)


@pytest.mark.parametrize(
    ("text", "dense"),
    [
        ("power:block=8+window=1+sink=0", []),
        ("power:block=8+window=1+sink=0+dense_layers=1+dense_period=3+dense_offset=1", [1]),
    ],
)
def test_the_loss_is_that_of_the_pattern_written_out(tiny_folder, text, dense):
    oracle, ids = Oracle(tiny_folder), torch.arange(70) * 37 % 900 + 20
    rows = torch.arange(70)
    distance = rows[:, None] // 8 - rows[None] // 8
    reads = (distance & (distance - 1)) == 0

    want = losses_of(oracle, ids, reads, dense)
    method = create_attention_method(text)
    got = MaskedModel(str(tiny_folder)).loss(ids, method)
    assert got == pytest.approx(want, abs=1e-4)
    assert got != pytest.approx(losses_of(oracle, ids, reads, [0, 1, 2]), abs=1e-3)


def losses_of(oracle, ids, reads, dense):
    """Mean loss of the second half, layer by layer through the oracle."""
    rows = torch.arange(len(ids))
    keys, values = oracle.empty(len(ids)), oracle.empty(len(ids))
    weights, layers = dict(oracle.w), oracle.layers
    h, embedding = None, weights["model.embed_tokens.weight"]
    try:
        oracle.layers = 1
        for layer in range(layers):
            if h is not None:
                # One layer at a time: its weights as those of the first, its input as the embedding.
                oracle.w = {
                    name.replace(f"layers.{layer}.", "layers.0."): tensor
                    for name, tensor in weights.items()
                    if f"layers.{layer}." in name
                } | {"model.embed_tokens.weight": embedding.clone()}
                oracle.w["model.embed_tokens.weight"][ids] = h
            reads_here = None if layer in dense else reads
            h = oracle.run(ids.tolist(), rows, keys, values, reads=reads_here)
    finally:
        oracle.layers, oracle.w = layers, weights
    half = len(ids) // 2
    return -sum(
        float(oracle.log_probs(h[: at + 1])[ids[at + 1]]) for at in range(half, len(ids) - 1)
    ) / (len(ids) - 1 - half)


def test_a_method_that_reads_everything_costs_nothing(tiny_folder, capsys):
    words = ["--model", str(tiny_folder), "--tokens", "40", "--texts", "2", "--json"]
    words += ["--methods", "power:block=64,dilated:block=8+window=3"]
    assert power_nll.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    whole, gaps = report["methods"].values()
    assert whole["delta"]["values"] == pytest.approx([0, 0], abs=1e-4)
    assert (whole["density"], whole["blocks_last_row"]) == (1.0, 1)
    assert gaps["density"] < 0.6
    assert abs(gaps["delta"]["median"]) > 1e-3
    assert "2 texts of 40 tokens" in power_nll.table(report)
    with pytest.raises(EvalError, match="give methods that are static"):
        power_nll.PowerNllConfig(methods="block_topk")
    with pytest.raises(EvalError, match="there are"):
        power_nll._texts(
            power_nll.ModelTokenizer.load(tiny_folder), power_nll.PowerNllConfig(texts=10**6)
        )


def test_passkeys_are_read_where_the_pattern_reaches_them(tiny_folder, smollm2_path, capsys):
    """A method of dense layers only recalls what dense attention does; the passkey stands where it should."""
    config = power_passkey.PowerPasskeyConfig(tokens=400, prompts=3)
    tokenizer = ModelTokenizer.load(smollm2_path)
    prompts = power_passkey.make_prompts(config, tokenizer)
    places = []
    for ids, count in prompts:
        assert 300 < len(ids) <= 400
        text, key = tokenizer.decode(ids[:-count].tolist()), tokenizer.decode(ids[-count:].tolist())
        assert text.count(f"The pass key is {key}. ") == 1
        places.append(text.index(key) / len(text))
    assert places == sorted(places)
    assert places[0] < 0.35 < 0.65 < places[-1]
    whole = "power:block=8+dense_layers=7"
    words = ["--model", str(tiny_folder), "--tokens", "200", "--prompts", "2", "--methods"]
    assert power_passkey.main([*words, f"{whole},power:block=8+window=1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["methods"]
    assert found[whole]["key_nll"] == found["dense"]["key_nll"]
    assert found["power:block=8+window=1"]["key_nll"] != found["dense"]["key_nll"]
    assert found["power:block=8+window=1"]["density"] < 0.5
    assert "2 prompts of" in power_passkey.table(report)


def test_a_prompt_without_room_for_filler_is_refused(smollm2_path):
    with pytest.raises(EvalError, match="a prompt needs at least"):
        power_passkey.make_prompts(
            power_passkey.PowerPasskeyConfig(tokens=80), ModelTokenizer.load(smollm2_path)
        )
