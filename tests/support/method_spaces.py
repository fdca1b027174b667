"""Requests of an attention method on the world's server: submitted, served, and where they stand."""

from __future__ import annotations

from fusion_world.requests import Req
from fusion_world.server import Server

from rag_pipeline.sglang_plugin.fusion.admission import admit as admission
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import state_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import set_runtime

POWER, OTHER = "power:block=8+window=1", "power:block=8+window=2"
IDS = list(range(3, 43))
NOBODY = RadixNamespace(None, None)


def submitted(server, fusion=None, tenant=NOBODY, ids=IDS):
    server.submit(f"r{len(server.waiting_queue)}", ids, tenant, fusion)
    return server.waiting_queue[-1]


def serve(server, req, answer=(), rows=1000):
    """Compute a prompt and an answer, end the request, and return the tokens that were found in the tree."""
    for _ in range(40):
        if req in server.running:
            break
        server.turn(rows, ())
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


def method_server(attention="dense", *, page_size=1, automatic=False):
    """Make the world's server with a default method, as the runtime of this process."""
    server = Server()
    server.runtime.config = FusionConfig(
        min_reused_tokens=6, self_check=False, attention=attention, automatic=automatic
    )
    server.runtime.page_size = page_size
    set_runtime(server.runtime)
    return server
