"""Which requests of an attention method stand in a radix namespace of their own, and what they publish there; no engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fusion_world import checks
from fusion_world.server import Req, Server

from rag_kernels import create_attention_method
from rag_pipeline.errors import EngineError
from rag_pipeline.protocol import FusionRequest, RequestError
from rag_pipeline.protocol.fields import parse_custom_params
from rag_pipeline.sglang_plugin.fusion.admission import admit as admission
from rag_pipeline.sglang_plugin.fusion.admission.method_space import enter_space, tenant_of
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
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import set_runtime

POWER, OTHER = "power:block=8+window=1", "power:block=8+window=2"
IDS = list(range(3, 43))
NOBODY = RadixNamespace(None, None)


@pytest.fixture
def make_server(monkeypatch):
    """Make the world's server with a default method, as the runtime of this process."""

    # That what is called exact is plain prefill: of a method's own namespace it is not.
    for name in ("check", "_check_spans"):
        monkeypatch.setattr(checks.Plan, name, lambda plan: None)

    def make(attention="dense", *, page_size=1, automatic=False):
        server = Server()
        server.runtime.config = FusionConfig(
            min_reused_tokens=6, self_check=False, attention=attention, automatic=automatic
        )
        server.runtime.page_size = page_size
        set_runtime(server.runtime)
        return server

    yield make
    set_runtime(None)


def submitted(server, fusion=None, tenant=NOBODY, ids=IDS):
    server.submit(f"r{len(server.waiting_queue)}", ids, tenant, fusion)
    return server.waiting_queue[-1]


def serve(server, req, answer=(), **kwargs):
    """Compute a prompt and an answer, end the request, and return the tokens that were found in the tree."""
    for _ in range(40):
        if req in server.running:
            break
        server.turn(kwargs.get("rows", 1000), ())
    found = state_of(req).radix_len if state_of(req) else None
    server.decode(req, answer)
    server.finish(req)
    return found


def held(server, tenant, ids):
    return len(server.tree.path(tenant, ids))


def server_space(server, fusion):
    """Where a request of a method stands."""
    req = Req("asked", IDS, NOBODY, fusion)
    admission.after_req_init(None, req)
    return req.tenant


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


def test_a_prefix_is_shared_by_the_method_of_a_tenant_and_by_nobody_else(make_server):
    server = make_server(POWER)
    acme = RadixNamespace(None, "acme")
    assert serve(server, submitted(server, tenant=acme)) == 0
    longer = [*IDS, 5, 6, 7]
    assert serve(server, submitted(server, tenant=acme, ids=longer)) == len(IDS)
    assert serve(server, submitted(server, {"attention": POWER}, acme, longer)) == len(longer) - 1
    for fusion, tenant in (
        ({"attention": "dense"}, acme),
        ({"attention": OTHER}, acme),
        (None, NOBODY),
        (None, RadixNamespace(None, "globex")),
        (None, RadixNamespace("key", "acme")),
    ):
        assert serve(server, submitted(server, fusion, tenant, longer)) == 0
    # And what those computed densely is none of the method's.
    more = [*longer, 9]
    assert serve(server, submitted(server, tenant=acme, ids=more)) == len(longer)


def test_pieces_publish_as_they_come(make_server):
    server = make_server(POWER)
    req = submitted(server)
    server.turn(16, ())
    assert held(server, req.tenant, IDS) == 16
    serve(server, req, rows=16)
    assert held(server, req.tenant, IDS) == len(IDS)


@pytest.mark.parametrize("page_size", [1, 4, 8])
def test_a_method_that_chooses_by_blocks_of_rows_shares_whole_ones(make_server, page_size):
    """Rows of a part of a block would have chosen with others in another prompt."""
    method = {"attention": "block_topk:block=8"}
    server = make_server(page_size=page_size)
    assert serve(server, submitted(server, method, ids=IDS[:-3]), (5, 6, 7, 8)) == 0
    assert held(server, server_space(server, method), IDS) == 32
    assert serve(server, submitted(server, method, ids=IDS[:21] + IDS[:9])) == 16
    assert serve(server, submitted(server, method)) == 32
    assert (
        serve(server, submitted(server, method)) == 32
    )  # the last token is computed, so its block is
    assert held(server, server_space(server, method), IDS) == 40
    assert not server.runtime.metrics.counts["prefixes.by_method"]


@pytest.mark.parametrize("rows", [1000, 16])
def test_rows_of_two_prompts_never_stand_in_one_block(make_server, rows):
    """The tree would give the second prompt the first one's rows up to where they part, inside a block."""
    method = {"attention": "block_topk:block=8"}
    server = make_server()
    space = server_space(server, method)
    serve(server, submitted(server, method))
    other = IDS[:21] + IDS[:19]
    req = submitted(server, method, ids=other)
    assert serve(server, req, rows=rows) == 16
    assert (
        held(server, space, other) == 21
    )  # of the first prompt; the second one's own are not there
    assert held(server, space, IDS) == 40
    # Where nothing is in the way, a prompt that goes on behind whole blocks is published as ever.
    longer = [*IDS, *IDS[:9]]
    assert serve(server, submitted(server, method, ids=longer), rows=rows) == 40
    assert held(server, space, longer) == 48
    # When the first prompt is forgotten, there is room for the second.
    server.tree.evict(16)
    serve(server, submitted(server, method, ids=other), rows=rows)
    assert held(server, space, other) == 40


def test_a_page_that_is_no_part_of_a_block_cuts_at_both(make_server):
    method = {"attention": "block_topk:block=8"}
    server = make_server(page_size=12)
    serve(server, submitted(server, method))
    assert serve(server, submitted(server, method, ids=IDS[:-1])) == 24


@pytest.mark.parametrize(
    ("fusion", "reason"),
    [
        ({"attention": "vertical_slash:block=8"}, "by_method"),
        ({"attention": POWER, "spans": [8, 30]}, "chunks"),
        ({"attention": POWER, "conversation": "c"}, "conversation"),
    ],
)
def test_why_nothing_is_shared_is_counted(make_server, fusion, reason):
    server = make_server()
    serve(server, submitted(server, fusion))
    counts = server.runtime.metrics.counts
    assert {name: n for name, n in counts.items() if "prefixes" in name} == {
        f"prefixes.{reason}": 1
    }


def test_the_answer_is_published_where_the_method_decoded_it(make_server):
    """``power`` acts on decoding; the world decodes without it, so here a request is told what happened."""
    for decodes, published in ((True, 4), (False, 0)):
        server = make_server(POWER)
        req = submitted(server)
        server.turn(1000, ())
        if not decodes:
            state_of(req).decode_densely()
        server.decode(req, (5, 6, 7, 8))
        ids = list(req.full_untruncated_fill_ids)
        server.finish(req)
        assert held(server, req.tenant, ids) == len(IDS) + published


def test_a_piece_that_begins_within_a_block_of_rows_ends_what_is_published(make_server):
    method = {"attention": "block_topk:block=8"}
    for rows, published in ((16, len(IDS)), (12, 8)):
        server = make_server(page_size=8)
        req = submitted(server, method)
        serve(server, req, rows=rows)
        assert held(server, req.tenant, IDS) == published


@pytest.mark.parametrize("attention", [POWER, "block_topk:block=8"])
def test_dense_decoding_is_no_part_of_a_method(make_server, attention):
    server = make_server(attention, page_size=8)
    server.runtime.mixes_decoding = True  # decoded beside prompts, where every key is read
    req = submitted(server)
    serve(server, req, (5, 6, 7))
    assert held(server, req.tenant, [*IDS, 3, 5, 6, 7]) == len(IDS)


# -- doubt --------------------------------------------------------------------------------------


def test_a_fault_publishes_nothing_more(make_server):
    server = make_server(POWER)
    req = submitted(server)
    server.turn(16, ())
    server.fails_at = 1
    serve(server, req, (5, 6), rows=16)
    assert server.runtime.metrics.counts["fallbacks.fused_pass_error"] == 1
    assert held(server, req.tenant, IDS) == 16


def test_a_request_that_is_refused_in_the_queue_goes_back_to_its_own_namespace(make_server):
    server = make_server(POWER)
    serve(server, submitted(server))
    req = submitted(server)
    assert state_of(req).space
    req.session = object()  # SGLang sets some fields after it has made the request
    server.turn(1000, ())
    assert req not in server.running  # it is matched again
    server.turn(1000, ())
    assert (req.extra_key, state_of(req).radix_len) == (None, 0)
    server.finish(req)
    assert held(server, NOBODY, IDS) == len(IDS)


def test_a_request_that_reads_everything_after_all_publishes_nothing_in_a_space(make_server):
    server = make_server(POWER)
    req = submitted(server)
    space = req.tenant
    original = server._add

    def refused_beside(adder, req):
        state_of(req).give_up("beside_lora")
        original(adder, req)

    server._add = refused_beside
    serve(server, req, (5,))
    assert held(server, space, IDS) == 0


def test_new_weights_are_another_space(make_server):
    server = make_server(POWER)
    serve(server, submitted(server))
    waiting = submitted(server)
    old = waiting.tenant
    server.runtime.new_weights(in_update=False, tree_is_old=True)  # the tree is not flushed
    assert serve(server, waiting) == 0
    assert waiting.tenant != old
    assert held(server, waiting.tenant, IDS) == len(IDS)


def test_a_retracted_request_finds_the_space_of_the_weights_in_use(make_server):
    server = make_server(POWER)
    req = submitted(server)
    server.turn(1000, ())
    server.retract(req)
    server.turn(1000, ())
    assert state_of(req).radix_len == len(IDS)  # its first token is part of what it prefills now
    server.runtime.new_weights(in_update=False, tree_is_old=True)
    server.retract(req)
    server.turn(1000, ())
    server.turn(1000, ())
    assert state_of(req).radix_len == 0


def test_while_weights_are_written_requests_stand_in_the_exact_namespace(make_server):
    server = make_server(POWER)
    req = submitted(server)
    server.runtime.new_weights(in_update=True, tree_is_old=False)
    assert enter_space(server.runtime, req, state_of(req))
    assert req.extra_key is None


def test_an_aborted_request_publishes_what_the_method_had_computed(make_server):
    server = make_server(POWER)
    req = submitted(server)
    server.turn(16, ())
    server.finish(req, reason="abort")
    assert held(server, req.tenant, IDS) == 16
