"""Lives of an engine that keeps the turns of conversations: real stores, tiers and fetches, no model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny_facts import tiny_facts

from chunk_cache import RecordForm
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.admission import fetching
from rag_pipeline.sglang_plugin.fusion.builds import persistence
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.conversations.base import FinishedTurn
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import ATTRIBUTE, RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

PREFIX, TURN = 8, 40
"""Tokens of the shared part and of a turn with its answer."""
ONE_TURN = 2500
"""Bytes that hold the record of one turn, and not those of two."""
ACME, GLOBEX = RadixNamespace(None, "acme"), RadixNamespace(None, "globex")


def whole(turns: int) -> list[int]:
    """Tokens of a conversation with so many turns."""
    return [*range(PREFIX), *(100 * turn + n for turn in range(1, turns + 1) for n in range(TURN))]


_IDLE = SimpleNamespace(can_run_list=[], running_batch=SimpleNamespace(is_empty=lambda: True))


class Life:
    """One life of an engine over its tiers; the KV of a token is its id.

    Parameters
    ----------
    weights : str
        Fingerprint of the model.
    room : int
        Bytes of memory.
    **settings
        Of :class:`FusionConfig`: ``store_dir``, ``remote`` and so on.
    """

    def __init__(self, *, weights: str = "w", room: int = 1 << 20, **settings: Any) -> None:
        config = FusionConfig(store_bytes=room, **settings)
        self.runtime = FusionRuntime(config, tiny_facts(weights))
        kv = torch.zeros(1, 1, 1, 2)
        self.runtime.record_form = RecordForm("heads", kv, kv)
        persistence.start_tiers(self.runtime, "no-model")

    def ask(
        self,
        turns: int,
        *,
        tenant: RadixNamespace = ACME,
        fused: bool = False,
        radix_len: int = 0,
        **fusion: Any,
    ) -> RequestState:
        """Serve a prompt of so many turns, and keep what it leaves; the state holds what it had leased."""
        state = self.admitted(turns, tenant=tenant, radix_len=radix_len, **fusion)
        state.report.runs = [[1, 1]] if fused else []
        if fused:
            # As behind a chunk that was computed elsewhere.
            state._found.approximate_from, state._found.approximations = PREFIX, (("chunk",),)
        ids = np.array(whole(turns))
        kv = torch.tensor(ids, dtype=torch.float32).repeat(2, 1).T[:, None]
        pool = SimpleNamespace(get_key_buffer=lambda i: kv, get_value_buffer=lambda i: kv)
        slots = torch.arange(ids.size)
        self.loaded = [(s.start, s.end, s.is_exact) for s in state.spans]
        for span in state.spans:
            keys = span.lease.record.layer(0).k[span.match.chunk_offset :][: span.end - span.start]
            assert keys[:, 0, 0].tolist() == ids[span.start : span.end].tolist()
        state.finish(state.prompt.size)
        self.runtime.conversations.keep(
            FinishedTurn(state=state, tenant=tenant, ids=ids, pool=pool, slots=slots)
        )
        return state

    def waiting(self, turns: int, *, tenant: RadixNamespace = ACME, **fusion) -> SimpleNamespace:
        """A request that has come."""
        request = FusionRequest(prefix_len=PREFIX, conversation="c", policy="reuse", **fusion)
        state = RequestState(request, request.make_policy("reuse"), whole(turns), explicit=True)
        req = SimpleNamespace(rid="r", **tenant._asdict(), **{ATTRIBUTE: state})
        fetching.expect(self.runtime, req, state)
        return req

    def admitted(
        self, turns: int, *, tenant: RadixNamespace, radix_len: int, **fusion
    ) -> RequestState:
        req = self.waiting(turns, tenant=tenant, **fusion)
        state = getattr(req, ATTRIBUTE)
        while fetching.must_wait(self.runtime, _IDLE, req, state):
            pass
        assert self.runtime.fetcher is None or self.runtime.fetcher.drain(60)
        state.begin_attempt(radix_len, self.runtime.epoch)
        self.runtime.conversations.lease(state, tenant)
        state.resolve()
        return state

    def end(self) -> None:
        assert self.runtime.fetcher.close(60)
        assert self.runtime.tiers.close(60)
        self.runtime.store.check_integrity(expect_idle=True)

    def counts(self) -> dict[str, int]:
        return self.runtime.metrics.to_json()


EACH = [(PREFIX + TURN * n, PREFIX + TURN * (n + 1), True) for n in range(4)]
"""Runs that a prompt of five turns loads where all four in front are exact."""
