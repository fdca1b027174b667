"""The toy comparison of static patterns, and the order of documents: small runs, and what their numbers mean."""

from __future__ import annotations

import json

import pytest
import torch

from rag_eval.benchmarks import power_order, power_toy
from rag_eval.benchmarks.power_toy import PowerToyConfig, ToyModel, draw_prompts, reachable
from rag_eval.errors import EvalError

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
