"""What must hold after every forward, whatever lies in the store and in whatever order requests came."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from chunk_cache import hash_token_ids
from fusion_world import model
from rag_pipeline.protocol import FUSION_KEY
from rag_pipeline.sglang_plugin.fusion.forward.layer_pass import find_pass
from rag_pipeline.sglang_plugin.fusion.request.state import state_of

TOLERANCE = 2e-3
"""Between fp32 and fp64; keys and values are of size 1."""


def _same(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, ...]) -> bool:
    return all(
        bool(((have.double() - want).abs() <= TOLERANCE).all())
        for have, want in zip(found, wanted, strict=True)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """Where a record comes from: the tokens it was computed behind, its own, and whose they are."""

    epoch: int
    tenant: Any
    before: tuple[int, ...]
    ids: tuple[int, ...]


def writes_nothing_protected(server: Any, batch: Any) -> None:
    """(d) No pass names a slot of the tree as one to load, shift or compute into."""
    owned = set(server.tree.slots())
    fused = find_pass(batch)
    written = {int(slot) for slot in batch.out_cache_loc}
    if fused is not None:
        written |= {int(slot) for slot in fused.row_slots}
        for item in fused.loader._loads:
            written |= {int(slot) for slot in item.slots}
        for shift in fused.shifts:
            written |= {int(slot) for slot in shift.other_slots}
    assert not written & owned, f"writes into {len(written & owned)} slots of the tree"


class Guard:
    """(c, d) Nothing changes in the tree during a forward."""

    def __init__(self, server: Any, reqs: list[Any]) -> None:
        self._server = server
        self._slots = torch.tensor(server.tree.slots(), dtype=torch.int64)
        self._before = self._read()

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self._server.pool
        return pool.keys[:, self._slots].clone(), pool.values[:, self._slots].clone()

    def check(self) -> None:
        """Compare with what was there."""
        for old, new in zip(self._before, self._read(), strict=True):
            assert torch.equal(old, new), "exact KV of the tree was changed"


@dataclasses.dataclass(kw_only=True)
class Plan:
    """What one request of a batch was going to load, and what it may claim afterwards."""

    server: Any
    req: Any
    spans: list[Any]
    captures: list[Any]
    prefix_len: int
    is_full: bool

    @classmethod
    def of(cls, server: Any, req: Any) -> Plan:
        """Read it before the forward, and check what was planned."""
        state = state_of(req)
        spans = [] if state is None or state.done else list(state.spans)
        captures = [] if state is None else list(state.captures)
        plan = cls(
            server=server,
            req=req,
            spans=spans,
            captures=captures,
            prefix_len=req.prefix_len,
            is_full=bool(spans) and state.policy.ratio >= 1.0 and not any(s.is_turn for s in spans),
        )
        plan._check_spans()
        return plan

    def _check_spans(self) -> None:
        server, prompt = self.server, np.asarray(self.req.full_untruncated_fill_ids)
        last = 0
        for span in self.spans:
            assert span.start >= last, "spans overlap"
            last = span.end
            record, offset = span.lease.record, span.match.chunk_offset
            run = record.token_ids[offset : offset + span.end - span.start]
            assert np.array_equal(run, prompt[span.start : span.end]), "KV of other tokens"
            if span.is_turn:
                continue
            made = server.known[span.match.key]
            assert made.tenant == self.req.tenant, "KV of another tenant"
            assert made.epoch == server.epoch, "KV of other weights"
            before = len(made.before)
            assert span.delta == span.start - before - offset, "moved by a wrong distance"

    def check(self) -> None:
        """Compare the request's KV with plain prefill wherever it claims to be exact."""
        server, req, state = self.server, self.req, state_of(self.req)
        loads = [(s.start, s.end) for s in self.spans]
        kept = loads and not (state.report.fallback or self.is_full)
        if kept and req.approximate_from is None:
            # Everything in front of the first run that saw other tokens is exact, loaded or not.
            first = next((s.start for s in self.spans if not self._is_exact(s)), req.extend_end)
            req.approximate_from = first if first < req.extend_end else None
        if not kept:
            # A fault, or a policy that computes all: whatever earlier pieces loaded is exact again.
            if state is None or not state.spans:
                req.approximate_from = None if not loads else req.approximate_from
            if self.is_full or (loads and state.report.fallback):
                req.approximate_from = None
        limit = req.extend_end if req.approximate_from is None else req.approximate_from
        limit = min(limit, req.extend_end)
        ids = tuple(req.full_untruncated_fill_ids[:limit])
        slots = server.table[req.kv.req_pool_idx, :limit].long()
        found = server.pool.keys[:, slots], server.pool.values[:, slots]
        if ids:
            assert _same(found, model.truth(server.epoch, ids)), "what is called exact is not"
        self._check_stored()
        info = (req.customized_info or {}).get(FUSION_KEY)
        if info and req.extend_end == len(req.full_untruncated_fill_ids):
            self._check_usage(info[0])

    def _is_exact(self, span: Any) -> bool:
        """Whether a run was computed behind just the tokens that stand before it, by the record's own history."""
        if span.is_turn:
            return False
        made = self.server.known[span.match.key]
        first = [*made.before, *made.ids][: len(made.before) + span.match.chunk_offset]
        return first == list(self.req.full_untruncated_fill_ids[: span.start])

    def _check_stored(self) -> None:
        server, req = self.server, self.req
        for capture in self.captures:
            ids = tuple(req.full_untruncated_fill_ids[: capture.end])
            key = capture.build.key
            lease = server.runtime.store.acquire(key, list(ids[capture.start :]))
            if lease is None:
                continue
            keys, values = model.truth(server.epoch, ids)
            record, part = lease.record, slice(capture.start, capture.end)
            assert _same((record.k, record.v), (keys[:, part], values[:, part])), (
                "stored KV is wrong"
            )
            assert record.base_position == capture.start
            server.known[key] = Made(
                epoch=server.epoch,
                tenant=req.tenant,
                before=ids[: capture.start],
                ids=ids[capture.start :],
            )
            lease.release()

    def _check_usage(self, report: dict[str, Any]) -> None:
        parts = ("exact_prefix_tokens", "reused_tokens", "recomputed_tokens", "fresh_tokens")
        counts = [report[part] for part in parts]
        assert min(counts) >= 0
        assert sum(counts) == report["prompt_tokens"], report
        if report["runs"]:
            by_kind = [sum(n for kind, n in report["runs"] if kind == k) for k in range(4)]
            assert by_kind == counts, report
        # A rank that lost a chunk alone builds it alone.
        self.server.seen.append({k: v for k, v in report.items() if k != "built_chunks"})


def tree_is_exact(server: Any) -> None:
    """(c) Every slot of the tree holds what plain prefill computes for the tokens on its path."""
    for _, path in server.tree.leaves():
        ids = tuple(node.token for node in path)
        slots = torch.tensor([node.slot for node in path])
        found = server.pool.keys[:, slots], server.pool.values[:, slots]
        assert _same(found, model.truth(server.epoch, ids)), "approximate KV was published as exact"


def exact_turns_are_exact(server: Any) -> None:
    """(c) A stored turn that is marked exact holds what plain prefill computes behind the tokens that it was kept behind."""
    table, store = server.runtime.conversations.table, server.runtime.store
    for turns in table._spaces.values():
        for turn in turns:
            if not turn.exact:
                continue
            ids = server.kept[turn.number]
            assert turn.before == hash_token_ids(ids[: turn.start])
            with store.borrow(turn.key) as record:
                if record is None or turn.key in server.proven:
                    continue
                keys, values = model.truth(server.epoch, ids)
                found, part = (record.k, record.v), slice(turn.start, len(ids))
                assert _same(found, (keys[:, part], values[:, part])), (
                    "an approximate turn is exact"
                )
                server.proven.add(turn.key)


def nothing_is_held(server: Any) -> None:
    """(e) No lease, build, slot or lock is left behind when nothing runs."""
    server.runtime.store.check_integrity(expect_idle=True)
    owned = server.tree.slots()
    assert sorted([*owned, *server.tree.free]) == list(range(1, server.pool.keys.shape[1]))
    assert all(node.locks == 0 for _, path in server.tree.leaves() for node in path)
    assert len(server.rows) == server.table.shape[0]
