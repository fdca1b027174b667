"""KV of finished turns, kept for the following turns of the same conversation and for nobody else.

A request that names a conversation asks for two things: that what it computed behind the shared prefix is kept when it
ends, and that what earlier turns left so is loaded again, unmoved and never recomputed. What plain prefill computed is
kept as exact, piece by piece: the radix tree holds it too, but drops it under pressure and does not outlive the
engine. What was computed over approximate KV is kept as a chain, each turn behind the one before it.

The key of a turn follows from contents alone (:class:`~.lineage.Lineage`): the tokens in front of it, the conversation
with the policy, its ratio and options and the attention method, and, where it is fused, the turn that it was computed
behind and the approximations that it went through. The tenant's salt stands in it as in the key of every chunk. So no
exact request, no other tenant, conversation or ratio ever finds a fused turn, and after a restart the same request
finds the same record: records go to the tiers below memory by the queue that chunks go by, and come back by the same
fetches.

Why not nodes of the radix tree under an extra key: a node's slots would then be shared with the exact prefix's
nodes, or begin in the middle of a prompt, and the tree knows neither. A stored turn is instead a record of the chunk
store, copied out of the pool when the turn ends and into the next turn's own slots: one copy in host memory under the
store's byte budget, evicted like any chunk, and no page, lock or slot that two requests share.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection

import numpy as np

from chunk_cache import (
    Build,
    Candidate,
    ChunkKey,
    ChunkKV,
    KVContext,
    Tier,
    as_token_ids,
    hash_token_ids,
)
from rag_pipeline.sglang_plugin.fusion.builds.capture import capture_chunk
from rag_pipeline.sglang_plugin.fusion.builds.persistence import write_record
from rag_pipeline.sglang_plugin.fusion.conversations.base import (
    ConversationMemory,
    FinishedTurn,
    IsErased,
)
from rag_pipeline.sglang_plugin.fusion.conversations.lineage import Lineage
from rag_pipeline.sglang_plugin.fusion.conversations.shared_turns import SharedTurns, group_of
from rag_pipeline.sglang_plugin.fusion.conversations.stored_turns import Chain, StoredTurn
from rag_pipeline.sglang_plugin.fusion.conversations.turn_places import (
    TurnPlace,
    namespace_of,
    through_of,
)
from rag_pipeline.sglang_plugin.fusion.conversations.turn_table import MAX_TURNS, TurnTable
from rag_pipeline.sglang_plugin.fusion.request.holdings import Capture, LeasedSpan
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


class TurnMemory(ConversationMemory):
    """Every turn whole: exact ones where their tokens stand, fused ones as a tree, each behind the one before it."""

    name = "turns"

    def __init__(self, runtime: FusionRuntime) -> None:
        super().__init__(runtime)
        self.table = TurnTable(runtime.store, self._is_kept_below)
        self._shared = SharedTurns(runtime, self.table)

    # -- what there is ------------------------------------------------------------------------

    def wanted(self, state: RequestState, tenant: RadixNamespace) -> list[Candidate]:
        """Records of the turns that the prompt goes through."""
        found: dict[ChunkKey, Candidate] = {}
        for turn, _ in self.candidates(state, tenant):
            if turn.context is not None:
                ids = as_token_ids(turn.ids)
                found[turn.key] = Candidate(turn.key, ids, turn.context, tenant.owner)
        return list(found.values())

    def candidates(self, state: RequestState, tenant: RadixNamespace) -> Chain:
        """Turns that the prompt goes through where they stand, whether or not they are in memory."""
        namespace = self.known(state, tenant)
        return self.table.find(namespace, state.prompt, tenant=tenant.owner)

    def known(self, state: RequestState, tenant: RadixNamespace) -> str:
        """Namespace of a request's conversation, of which all turns are known to be its own."""
        namespace, facts = namespace_of(self.runtime, state, tenant), self.runtime.facts
        assert facts is not None
        self.table.confirm(
            namespace,
            lambda lineage: facts.context(prefix_digest=lineage.encode(), tenant=tenant.salt),
            tenant=tenant.owner,
        )
        return namespace

    def look_up(self, state: RequestState, tenant: RadixNamespace) -> threading.Event | None:
        """Ask for the turns that other servers, or earlier lives, left in a store that several servers share."""
        facts = self.runtime.facts
        assert facts is not None
        context = facts.context(prefix_digest="-", tenant=tenant.salt)
        namespace = namespace_of(self.runtime, state, tenant)
        return self._shared.ask(context, namespace, tenant.owner)

    def group_of(self, context: KVContext) -> str | None:
        """Name of the conversation's list; none for what is no turn."""
        lineage = Lineage.decode(context.prefix_digest)
        return None if lineage is None else group_of(context, lineage.space)

    def restore(self, tier: Tier, namespaces: Collection[str]) -> int:
        """List the turns that a tier holds, those without room in memory too; keys are checked when they are asked for."""
        lineages: dict[str, Lineage] = {}
        for namespace in namespaces:
            lineage = Lineage.decode((tier.describe(namespace) or {}).get("prefix_digest"))
            if lineage is not None:
                lineages[namespace] = lineage
        found: dict[tuple[str, str], list[StoredTurn]] = {}
        for key in tier.keys_by_use() if lineages else ():
            if key.namespace not in lineages:
                continue
            with self.runtime.store.borrow(key) as record:
                ids = tier.token_ids(key) if record is None else record.token_ids
            if ids is not None:
                lineage = lineages[key.namespace]
                turn = StoredTurn(lineage=lineage, ids=ids.astype(np.int64), key=key)
                whose = tier.tenant_of(key.namespace), lineage.space
                found[whose] = [*found.pop(whose, [])[1 - MAX_TURNS :], turn]
        for (owner, _), turns in found.items():  # the conversation that was used last comes last
            for turn in sorted(turns, key=lambda turn: turn.start):
                self.table.add(turn, tenant=owner)
        return sum(map(len, found.values()))

    def _is_kept_below(self) -> bool:
        # After an update of the weights no tier holds anything of them.
        return self.runtime.fetcher is not None and not self.runtime.epoch

    # -- the next turn ------------------------------------------------------------------------

    def lease(self, state: RequestState, tenant: RadixNamespace) -> None:
        """Lease the turns that the prompt goes through and every rank has."""
        runtime = self.runtime
        chain: list[StoredTurn] = []

        def offer() -> list[tuple[int, int, int]]:
            is_broken = False
            for turn, match in self.candidates(state, tenant):
                if match.prompt_end <= state.radix_len or (is_broken and not turn.exact):
                    continue
                found = runtime.store.acquire_matches(state.prompt, [match])
                if not found:
                    self._note_miss(state, turn)
                    # What stands behind a fused turn was computed over it.
                    is_broken = is_broken or not turn.exact
                    continue
                lease = found[0][1]
                is_exact = turn.exact and lease.record.is_lossless
                chain.append(turn)
                state.lease([LeasedSpan(match=match, lease=lease, is_turn=True, is_exact=is_exact)])
            return [(s.start, s.end, t.number) for s, t in zip(state.spans, chain, strict=True)]

        offers = runtime.group.gather(offer)
        agreed: list[tuple[StoredTurn, LeasedSpan]] = []
        lost: list[StoredTurn] = []
        is_broken = False
        for turn, span in zip(chain, state.spans, strict=True):
            ends = [_end_of(offer, span.start, turn.number) for offer in offers]
            end = min(ends)
            if not end or (is_broken and not turn.exact):
                lost.append(turn)
                is_broken = is_broken or not turn.exact
                continue
            # A rank on which the chain goes on leaves a turn where the next begins.
            agreed.append(
                (turn, dataclasses.replace(span, match=span.match.clipped(span.start, end)))
            )
        low = state.radix_len
        held = [
            dataclasses.replace(span, match=span.match.clipped(low, span.end))
            for _, span in agreed
            if span.end > low
        ]
        if sum(span.end - span.start for span in held) < runtime.config.min_reused_tokens:
            agreed, held = [], []  # the tree's exact KV reaches as far
        last = agreed[-1][0] if agreed else None
        state.set_turns(
            held,
            end=held[-1].end if held else 0,
            turn=last.number if last is not None and not last.exact else 0,
        )
        for turn in lost:
            # What one rank has lost all forget, or the next time that it is kept heads of two computations would mix.
            runtime.store.evict(turn.key)

    def _note_miss(self, state: RequestState, turn: StoredTurn) -> None:
        fetcher = self.runtime.fetcher
        if fetcher is None or (state.has_begun and not fetcher.is_on_its_way(turn.key)):
            self.table.note_absent(turn.key)

    # -- the finished turn --------------------------------------------------------------------

    def keep(self, turn: FinishedTurn) -> bool:
        """Store what the turn computed, in as many records as there are parts that no record holds."""
        runtime, owner = self.runtime, turn.tenant.owner
        namespace = self.known(turn.state, turn.tenant)
        least = runtime.config.min_reused_tokens
        places = [p for p in self.places_of(turn, namespace) if p.end - p.start >= least]
        kept = [self._keep(turn, namespace, place, owner) for place in places]
        return any(kept)

    def _keep(self, turn: FinishedTurn, namespace: str, place: TurnPlace, owner: str) -> bool:
        runtime, state, facts = self.runtime, turn.state, self.runtime.facts
        assert facts is not None
        ids, start = turn.ids[: place.end], place.start
        lineage = Lineage(
            space=namespace,
            start=start,
            before=hash_token_ids(ids[:start]),
            parent=place.parent,
            through=place.through,
        )
        context = facts.context(prefix_digest=lineage.encode(), tenant=turn.tenant.salt)
        record: ChunkKV | None = None

        def store() -> tuple[str, str]:
            nonlocal record
            if not runtime.may_store(state.epoch, state.radix_len):
                return "not_stored", ""
            if not (place.is_alone or self.table.has_room(namespace, ids, tenant=owner)):
                return "not_stored", ""
            own = ChunkKey.of(context, ids[start:])
            build = runtime.store.begin_build(own, ids[start:], owner="turn", tenant=owner)
            if not isinstance(build, Build):
                return "known", place.through  # the same turn was asked before
            with build:
                capture = Capture(start=start, end=place.end, base_position=start, build=build)
                made = capture_chunk(
                    facts.layout, turn.pool, facts.num_layers, turn.slots[: place.end], capture
                )
                if build.commit(made):
                    record = made
            # Of approximate KV it must be the same approximations on every rank.
            return ("not_stored" if record is None else "stored"), place.through

        outcome: set[tuple[str, str]] = set()
        stored = {("stored", place.through)}
        try:
            # Kept by all or by none, so that heads of two computations never mix.
            outcome = set(runtime.group.gather(store))
        finally:
            if record is not None and outcome != stored:
                runtime.store.evict(record.key)
        if outcome == {("known", place.through)}:
            return False
        if outcome != stored:
            runtime.metrics.count("turns", "not_stored")
            return False
        assert record is not None
        if place.is_alone:
            for old in self.table.alive(namespace, owner):
                if old.key != record.key:
                    runtime.store.evict(old.key)
            self.table.forget(lambda old, whose: whose == owner and old.lineage.space == namespace)
        self.table.add(
            StoredTurn(lineage=lineage, ids=ids[start:].copy(), key=record.key, context=context),
            tenant=owner,
        )
        write_record(runtime, record, context, owner)
        runtime.metrics.count("turns", "stored")
        return True

    def places_of(self, turn: FinishedTurn, namespace: str) -> list[TurnPlace]:
        """Parts of a finished turn that are kept, rising; the same on every rank."""
        state = turn.state
        # The part that conversations share is never cut, and many would store it.
        first, limit = state.request.prefix_len, turn.kv_len
        if state.approximate_from is not None:
            limit = min(limit, state.approximate_from)

        def missing() -> tuple[tuple[int, int, int], ...]:
            held = self.table.gaps(namespace, turn.ids, first, limit, tenant=turn.tenant.owner)
            return tuple(held)

        gaps = set(self.runtime.group.gather(missing))
        places = [
            TurnPlace(start=start, end=end, parent=parent)
            for start, end, parent in (gaps.pop() if len(gaps) == 1 else ())
        ]
        if state.approximate_from is not None:
            start = max(first, state.approximate_from, state.turns_end)
            through = through_of(self.runtime, state)
            places.append(
                TurnPlace(start=start, end=turn.kv_len, parent=max(0, state.turn), through=through)
            )
        return places

    def forget(self, keys: Collection[ChunkKey] | None = None) -> None:
        """Forget all, or the turns of these records."""
        if keys is None:
            self.table.clear()
        else:
            gone = frozenset(keys)
            self.table.forget(lambda turn, tenant: turn.key in gone)

    def erase(self, is_erased: IsErased) -> None:
        """Forget the turns that hold erased text."""
        self.table.forget(lambda turn, tenant: is_erased(turn.ids, tenant))


def _end_of(offer: list[tuple[int, int, int]], start: int, number: int) -> int:
    """Where a turn ends that a rank offers; 0 where it does not."""
    return next((end for at, end, one in offer if (at, one) == (start, number)), 0)
