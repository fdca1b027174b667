"""What requests of an attention method publish in a namespace of their own, who finds it, and what doubt withholds; no engine."""

from __future__ import annotations

import pytest
from method_spaces import IDS, NOBODY, OTHER, POWER, held, serve, server_space, submitted

from rag_pipeline.sglang_plugin.fusion.admission.method_space import enter_space
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import state_of


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
