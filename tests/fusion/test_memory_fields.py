"""What clients may ask of a conversation's memory, in which form, and what is refused with which words."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from rag_pipeline.protocol import (
    FusionRequest,
    MemoryFields,
    MemoryLoad,
    MemoryStore,
    RequestError,
    memory_id,
)
from rag_pipeline.protocol.fields import parse_custom_params, parse_fields, parse_request
from rag_pipeline.protocol.fusion_request import ACTION_TYPE
from rag_pipeline.sglang_plugin.fusion.request.validation import after_tokenize

NAME = "5f" * 32
OTHER = "a0" * 32
LOAD = {"start": 4, "end": 10, "id": NAME}
STORE = {"end": 20, "budget": 6, "rule": "epicache"}


def test_both_carriers_give_back_what_was_written():
    memory = MemoryFields(
        load=(MemoryLoad(**LOAD), MemoryLoad(start=4, end=10, id=OTHER)),
        spans=((2, 7), (100, 140)),
    )
    assert MemoryFields(store=MemoryStore(**STORE)).to_json() == {"store": STORE}
    _survives(FusionRequest(prefix_len=4, memory=memory))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_own_spans_travel_and_are_read_back(share):
    store = MemoryStore(**STORE, own=((0, 5), (9, 12)), own_share=share)
    written = STORE | {"own": [[0, 5], [9, 12]]} | ({"own_share": share} if share < 1 else {})
    assert MemoryFields(store=store).to_json() == {"store": written}
    _survives(FusionRequest(prefix_len=4, memory=MemoryFields(store=store)))


def _survives(request):
    params = request.to_custom_params()
    assert isinstance(params["rag_memory"], str)
    assert parse_custom_params(params, 30) == request
    (action,) = request.to_kv_hints()["actions"]
    assert action["action_type"] == ACTION_TYPE
    hints = SimpleNamespace(actions=[SimpleNamespace(**action)])
    assert parse_request(hints, None, 30) == request
    assert "rag_memory" not in FusionRequest().to_custom_params()


def test_nested_custom_params_become_a_string_before_they_travel():
    fields = {"rag_prefix_len": 4, "rag_memory": {"load": [LOAD]}}
    params = SimpleNamespace(custom_params=dict(fields))
    after_tokenize(
        SimpleNamespace(rid="r", sampling_params=params, kv_hints=None, input_ids=[1] * 30), None
    )
    assert json.loads(params.custom_params["rag_memory"]) == {"load": [LOAD]}


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ("{", "an object of JSON"),
        ("[" * 100_000, "an object of JSON"),
        ("[]", "load or store"),
        (7, "load or store"),
        ({}, "asks for nothing"),
        ({"spans": [[1, 2]]}, "asks for nothing"),
        ({"loads": []}, "allowed: load, store, spans"),
        ({"load": "x"}, "a list"),
        ({"load": [7]}, "start, end and id"),
        ({"load": [LOAD | {"kind": 1}]}, "allowed: start, end, id"),
        ({"load": [LOAD | {"start": 5}]}, "give 4"),
        ({"load": [LOAD | {"start": True}]}, "give 4"),
        ({"load": [LOAD | {"end": 4}]}, "above 4"),
        ({"load": [LOAD | {"end": 30}]}, "below the prompt's 30"),
        ({"load": [LOAD | {"end": 9.0}]}, "whole number"),
        ({"load": [LOAD | {"id": NAME[:-1]}]}, "64 hex digits"),
        ({"load": [LOAD | {"id": NAME.upper()}]}, "64 hex digits"),
        ({"load": [LOAD | {"id": None}]}, "64 hex digits"),
        ({"load": [LOAD, LOAD]}, "twice"),
        ({"load": [LOAD, LOAD | {"id": OTHER, "end": 11}]}, "the same start and end"),
        ({"load": [LOAD | {"id": c * 64} for c in "abc"]}, "at most 2"),
        ({"store": 7}, "end, budget and rule"),
        ({"store": STORE | {"probe": 1}}, "allowed: end, budget, rule"),
        ({"store": STORE | {"end": 4}}, "above 4"),
        ({"store": STORE | {"end": 31}}, "up to the prompt's 30"),
        ({"load": [LOAD], "store": STORE | {"end": 10}}, "above 10"),
        ({"store": STORE | {"budget": 0}}, "from 1"),
        ({"store": STORE | {"budget": True}}, "from 1"),
        ({"store": STORE | {"rule": ""}}, "epicache"),
        ({"store": STORE | {"rule": "x" * 201}}, "at most 200"),
        ({"store": STORE | {"rule": "best"}}, "'best'"),
        ({"store": STORE | {"rule": "snapkv:windows=3"}}, "'windows'"),
        ({"store": STORE | {"end": 30}}, "scores by a probe"),
        ({"load": [LOAD, LOAD | {"id": OTHER}], "store": STORE}, "behind two loads"),
        ({"store": STORE | {"own": 7}}, "own is 7; give [[start, end], ...]"),
        ({"store": STORE | {"own": [[3]]}}, "own [3]"),
        ({"store": STORE | {"own": [[3, 2]]}}, "the end above the start"),
        ({"store": STORE | {"own": [[3, 5], [4, 6]]}}, "disjoint"),
        ({"store": STORE | {"own": [[3, 5], [0, 2]]}}, "rising order"),
        ({"store": STORE | {"own": [[2 * n, 2 * n + 1] for n in range(1025)]}}, "at most 1024"),
        ({"store": STORE | {"own": [[3, 5]], "own_share": 0}}, "above 0 and up to 1"),
        ({"store": STORE | {"own": [[3, 5]], "own_share": float("nan")}}, "above 0 and up to 1"),
        ({"store": STORE | {"own": [[3, 5]], "own_share": True}}, "above 0 and up to 1"),
        ({"store": STORE | {"own_share": 0.5}}, "without own spans"),
        ({"load": [LOAD], "spans": 7}, "[[start, end], ...]"),
        ({"load": [LOAD], "spans": [[1]]}, "[start, end]"),
        ({"load": [LOAD], "spans": [[3, 3]]}, "the end above the start"),
        ({"load": [LOAD], "spans": [[0, 1]] * 300}, "at most 256"),
    ],
)
def test_a_malformed_memory_is_refused_in_one_line(memory, words):
    with pytest.raises(RequestError) as caught:
        parse_fields({"prefix_len": 4, "memory": memory}, 30)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "off"}, "mode 'off'"),
        ({"mode": "build", "spans": [[4, 9]]}, "mode 'build'"),
        ({"conversation": "c"}, "leave one out"),
        ({"attention": "power"}, "needs 'dense'"),
        ({"spans": [[9, 12]]}, "from 10 on"),
        ({"spans": [[22, 28]], "memory": {"store": STORE}}, "leave the chunks out"),
    ],
)
def test_what_cannot_stand_beside_a_memory_is_refused(fields, words):
    with pytest.raises(RequestError) as caught:
        parse_fields({"prefix_len": 4, "memory": {"load": [LOAD]}} | fields, 30)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_chunks_may_stand_behind_the_slots():
    request = parse_fields({"prefix_len": 4, "spans": [[12, 20]], "memory": {"load": [LOAD]}}, 30)
    assert request.spans == ((12, 20),)
    assert request.memory is not None
    assert request.memory.load_end == 10


def test_an_id_names_all_that_goes_into_a_record():
    given = ("", [1, 2], [3, 4, 5], [6], "epicache", 8)
    name = memory_id(*given)
    changed = [
        (name, *given[1:]),
        ("", [1, 2, 3], [4, 5], [6], "epicache", 8),  # the same tokens, cut elsewhere
        ("", [1, 2], [3, 4, 5, 6], [], "epicache", 8),
        ("", [1, 2], [3, 4, 5], [7], "epicache", 8),
        ("", [1, 2], [3, 4, 5], [6], "snapkv:window=64", 8),
        ("", [1, 2], [3, 4, 5], [6], "epicache", 9),
        (*given, [(0, 4)]),
        (*given, [(0, 5)]),
        (*given, [(0, 2), (2, 4)]),
        (*given, [(0, 4)], 0.5),
    ]
    assert len({name, *(memory_id(*one) for one in changed)}) == 11
    assert memory_id(*given, (), 0.5) == name  # a share of nothing
    assert (
        name == "a9da44ab11849f8779539036188422e860e3d0acd0d3a263ce65f11b684091a7"
    )  # ids without own spans are what they were
    arrays = [np.array(ids, dtype=np.int32) for ids in given[1:4]]
    assert memory_id("", *arrays, "epicache", 8) == name
    assert memory_id("", *arrays, "epicache:first=0", 8) == name  # its default, spelled out
    assert len(name) == 64
    assert set(name) <= set("0123456789abcdef")
