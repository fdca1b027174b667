"""Which requests of an attention method stand in a radix namespace of their own, and by what name; no engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fusion_world.requests import Req
from method_spaces import IDS, NOBODY, OTHER, POWER, serve, submitted

from rag_kernels import create_attention_method
from rag_pipeline.errors import EngineError
from rag_pipeline.protocol import FusionRequest, RequestError
from rag_pipeline.protocol.fields import parse_custom_params
from rag_pipeline.sglang_plugin.fusion.admission import admit as admission
from rag_pipeline.sglang_plugin.fusion.admission.method_space import tenant_of
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.conversations.turn_places import namespace_of
from rag_pipeline.sglang_plugin.fusion.request.namespace import (
    METHOD_SPACE,
    RadixNamespace,
    method_space,
)
from rag_pipeline.sglang_plugin.fusion.request.state import state_of
from rag_pipeline.sglang_plugin.fusion.request.validation import after_tokenize
from rag_pipeline.sglang_plugin.fusion.runtime import attention_methods
from rag_pipeline.sglang_plugin.fusion.runtime.attention_methods import method_for_weights

# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "", "mine", f"{METHOD_SPACE}x", ":"])
def test_a_namespace_comes_back_from_a_space(key):
    own, one, two = RadixNamespace(key, "salt"), method_space("a", 0), method_space("b", 0)
    moved = own.moved("", one)
    assert moved != own
    assert moved.cache_salt == "salt"
    assert moved.moved(one, "") == own
    assert moved.moved(one, two) == own.moved("", two)


def test_namespaces_of_clients_methods_and_epochs_are_all_different():
    keys = [
        RadixNamespace(key, salt).moved("", method_space(identity, epoch))
        for key in (None, "", "a", ":a")
        for salt in (None, "acme", "globex")
        for identity in ("power A", "power B")
        for epoch in (0, 1)
    ]
    assert len(set(keys)) == len(keys)


def test_clients_may_not_name_a_space():
    asked = SimpleNamespace(rid="r", extra_key=method_space("power", 0), sampling_params=None)
    with pytest.raises(RequestError, match=r"extra_key 'rag-attention-.*are taken"):
        after_tokenize(asked, None)
    after_tokenize(SimpleNamespace(rid="r", extra_key="rag", sampling_params=None), None)


# -- the default --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["powre", "power:window=0", 3])
def test_a_bad_default_ends_the_start_with_one_line(name):
    with pytest.raises(EngineError, match=r"attention|window") as caught:
        FusionConfig(attention=name)
    assert "\n" not in str(caught.value)


def test_unset_a_plain_request_is_none_of_fusions_business(make_server):
    req = submitted(make_server())
    assert state_of(req) is None
    assert req.extra_key is None


@pytest.mark.parametrize(
    ("fusion", "method"),
    [
        (None, POWER),
        ({"mode": "fuse"}, POWER),
        ({"attention": "dense"}, "dense"),
        ({"attention": OTHER}, OTHER),
        ({"mode": "off"}, "dense"),
        ({"mode": "build", "spans": [8, 30]}, "dense"),
        ({"spans": [8, 30]}, POWER),
    ],
)
def test_a_requests_own_choice_wins(make_server, fusion, method):
    assert state_of(submitted(make_server(POWER), fusion)).request.attention == method


def test_what_the_process_asks_for_itself_is_dense(make_server):
    server = make_server(POWER)
    server.submit("rag-internal-7", IDS, NOBODY, {"mode": "fuse"})
    assert state_of(server.waiting_queue[-1]).request.attention == "dense"


def test_dense_is_said_on_the_wire_and_nothing_where_nothing_is_named():
    said = FusionRequest(attention="dense").to_custom_params()
    assert said["rag_attention"] == "dense"
    assert parse_custom_params(said, 9).attention == "dense"
    assert "rag_attention" not in FusionRequest().to_custom_params()
    with pytest.raises(RequestError, match="attention is ''"):
        parse_custom_params({"rag_attention": ""}, 9)


@pytest.mark.parametrize(
    "field", ["return_logprob", "return_hidden_states", "multi_item_delimiter_indices"]
)
def test_plain_requests_that_read_numbers_are_dense(make_server, field):
    make_server(POWER)
    req = Req("r", IDS, NOBODY, None)
    setattr(req, field, [True])
    admission.after_req_init(None, req)
    assert state_of(req) is None
    assert req.extra_key is None


def test_a_plain_request_of_the_default_method_loads_no_chunks(make_server):
    server = make_server(POWER)
    serve(server, submitted(server, {"mode": "build", "spans": [8, 40]}))
    assert server.runtime.store.stats().chunks_now == 1
    server.tree.evict(0)
    plain = submitted(server)
    server.turn(1000, ())
    assert (state_of(plain).radix_len, state_of(plain).report.reused_tokens) == (0, 0)
    server.finish(plain)
    server.tree.evict(0)
    asked = submitted(server, {"spans": [8, 40], "policy": "reuse"})
    server.turn(1000, ())
    assert state_of(asked).report.reused_tokens > 0


# -- who stands where ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fusion", "page_size", "is_apart"),
    [
        ({"attention": POWER}, 1, True),
        ({"attention": "block_topk:block=16"}, 1, True),
        ({"attention": "block_topk:block=16"}, 16, True),
        ({"attention": "block_topk:block=16"}, 24, True),
        ({"attention": "sale"}, 1, True),
        ({"attention": "sale"}, 64, True),
        ({"attention": "vertical_slash"}, 64, False),
        ({"attention": "dense"}, 64, False),
        ({"attention": POWER, "spans": [8, 30]}, 1, False),
        ({"attention": POWER, "conversation": "c"}, 1, False),
    ],
)
def test_only_where_a_prefix_is_the_same_whatever_follows(make_server, fusion, page_size, is_apart):
    req = submitted(make_server(page_size=page_size), fusion, RadixNamespace("own", "acme"))
    state = state_of(req)
    assert bool(state.space) == is_apart
    assert (req.extra_key != "own") == is_apart
    assert req.cache_salt == "acme"
    assert tenant_of(req, state) == RadixNamespace("own", "acme")


def test_options_and_calibration_are_part_of_the_space(make_server, monkeypatch):
    server = make_server(page_size=64)
    spaces = {
        state_of(submitted(server, {"attention": text})).space
        for text in (POWER, OTHER, "sale", "sale:thresholds=0.01", "streaming:block=8")
    }
    assert len(spaces) == 5
    method = method_for_weights(server.runtime, FusionRequest(attention="sale"))
    monkeypatch.setattr(method, "_tau", 0.25)  # as another table would
    assert state_of(submitted(server, {"attention": "sale"})).space not in spaces


def test_turns_are_found_with_the_calibration_that_they_were_computed_with(
    make_server, monkeypatch
):
    """A tier outlives the engine, and its model may be calibrated before the next one starts."""
    server = make_server()
    state = state_of(submitted(server, {"attention": "sale", "conversation": "c"}))
    spaces = {namespace_of(server.runtime, state, NOBODY)}
    for name in ("sale:thresholds=0.01", "sale:thresholds=0.02"):
        monkeypatch.setattr(
            attention_methods, "_for_checkpoint", lambda *_, m=name: create_attention_method(m)
        )
        spaces.add(namespace_of(server.runtime, state, NOBODY))
    assert len(spaces) == 3


# -- what is shared -----------------------------------------------------------------------------


# -- doubt --------------------------------------------------------------------------------------
