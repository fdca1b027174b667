"""Two engines of their own, stock and ours: requests that are not fused have stock's bits, whatever is fused between them.

The stock engine runs on the same platform and attention backend with every hook left out, by SGLang's own white
list; without that platform SGLang does not start on a plain CPU. The same sequence of ordinary requests goes
to both. Ours also stores chunks and runs fused requests over the same text in between. ``test_engine.py`` compares
with stock's own attention on a real model; this one has no tolerance anywhere.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
from fusion_helpers import CHUNK, PREFIX, PREFIX_IDS, tokens

pytestmark = pytest.mark.engine

POLICIES = ["reuse", "query:0.5", "epic:0.4", "cacheblend:0.5", "full"]


CHUNKS = [tokens(CHUNK, 10 + i) for i in range(5)]


def prompts():
    """Twenty prompts over the same five chunks, three in each, every one with another first pair."""
    made = []
    for number, order in enumerate(list(itertools.permutations(range(5), 3))[::3]):
        ids, spans = list(PREFIX_IDS), []
        for index in order:
            spans.append((len(ids), len(ids) + CHUNK))
            ids += CHUNKS[index]
        made.append((ids + tokens(4 + number % 5, 300 + number), spans))
    return made


def exact(ids, new=6, **fields):
    return {"kind": "exact", "ids": ids, "new": new, **fields}


def fused(ids, new=4, **fusion):
    return {"kind": "fused", "ids": ids, "new": new, "fusion": fusion}


def case():
    flush = {"kind": "flush"}
    off = {"mode": "off"}
    # Nothing is stored yet: requests as any client sends them, each twice.
    steps = [exact(ids) for ids, _ in prompts() for _ in range(2)]
    steps += [exact(ids, start=0) for ids, _ in prompts()[:3]]
    steps += [
        fused(PREFIX_IDS + chunk, 1, mode="build", spans=[(PREFIX, PREFIX + CHUNK)])
        for chunk in CHUNKS
    ]
    steps += [flush, exact([*PREFIX_IDS, 3], 1, fusion=off)]
    # Now every chunk is. What a request publishes stays in the tree for those that follow.
    for number, (ids, spans) in enumerate(prompts()):
        policy = POLICIES[number % len(POLICIES)]
        steps.append(fused(ids, spans=spans, policy=policy))
        steps.append(exact(ids, fusion=off))
        steps.append(fused([*ids[:-1], 3], spans=spans, policy=policy))
        steps.append(exact([*ids, 5, 6, 7], fusion=off))
    # Text that is not stored, without any field: it is scanned, and nothing is found.
    steps += [exact(tokens(70 + 9 * i, 900 + i)) for i in range(5)]
    return steps


@pytest.fixture(scope="module")
def seen(tiny_model, tmp_path_factory, warm_start):
    folder = tmp_path_factory.mktemp("interleaved")
    file = folder / "case.json"
    file.write_text(json.dumps(case()))
    runs, outs = {}, {}
    for mode, variables in (("stock", {"SGLANG_PLUGINS": "rag_cpu"}), ("plugin", {})):
        outs[mode] = folder / f"{mode}.json"
        program = Path(__file__).with_name("interleaved.py")
        words = [mode, str(tiny_model("llama")), str(file), str(outs[mode])]
        runs[mode] = warm_start.popen(
            [sys.executable, program, *words],
            environment=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            stdout=folder / f"{mode}.log",
            fork_children=mode == "stock",
        )
    try:
        for mode, process in runs.items():
            code = process.wait(timeout=900)
            assert code == 0, (folder / f"{mode}.log").read_text()[-3000:]
    finally:
        for process in runs.values():
            process.kill_group()
            process.wait()
    return {mode: json.loads(out.read_text()) for mode, out in outs.items()}


def test_one_engine_is_stock_and_the_other_is_ours(seen):
    assert seen["stock"]["patched"] == []
    assert not seen["stock"]["activation"]["active"]
    assert seen["stock"]["activation"]["attention_backend"] == "rag_cpu"
    assert seen["plugin"]["activation"]["active"]
    assert seen["plugin"]["activation"]["unapplied"] == []


def test_requests_without_spans_have_the_bits_of_stock(seen):
    stock, ours = seen["stock"]["exact"], seen["plugin"]["exact"]
    wanted = [step for step in case() if step["kind"] == "exact"]
    assert len(stock) == len(ours) == len(wanted) == 20 * 2 + 3 + 1 + 20 * 2 + 5
    for number, (one, two) in enumerate(zip(stock, ours, strict=True)):
        assert one == two, f"exact request {number}"
        assert one["report"] is None
    # The comparison is of something: prefixes were hit, input and top log-probabilities are there.
    assert sum(answer["cached"] > PREFIX for answer in ours) >= 40
    assert sum(len(answer["input"]) > CHUNK for answer in ours) == 3
    assert all(len(row) == 5 for answer in ours for row in answer["top"])


def test_what_ran_in_between_was_really_fused(seen):
    reports = [answer["report"] for answer in seen["plugin"]["fused"]]
    builds, asked = reports[: len(CHUNKS)], reports[len(CHUNKS) :]
    assert [report["built_chunks"] for report in builds] == [1] * len(CHUNKS)
    first = asked[::2]  # the second of each pair finds its chunks in the exact prefix by then
    # The first chunk is in the exact prefix where an earlier prompt began with it; the others are not.
    loaded = [report["reused_tokens"] + report["recomputed_tokens"] for report in first]
    assert len(loaded) == 20
    assert min(loaded) >= 2 * CHUNK
    assert {report["policy"] for report in first} == {name.partition(":")[0] for name in POLICIES}
    # And was approximate: but for ratio 1, a fused answer is not that of the exact request behind it.
    answers = seen["plugin"]["fused"][len(CHUNKS) :: 2]
    pairs = zip(answers, seen["plugin"]["exact"][44:84:2], strict=True)
    differs = [
        one["logprobs"][0] != two["logprobs"][0]
        for one, two in pairs
        if one["report"]["policy"] != "full"
    ]
    assert len(differs) == 16
    assert all(differs)
