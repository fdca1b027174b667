"""Fused KV of a finished turn, kept for the following turns of the same conversation and for nobody else.

A request that names a conversation asks for two things: that what it computed behind its exact prefix is kept when
it ends, and that what earlier turns left so is loaded again, unmoved and never recomputed. The namespace is the
tenant, the conversation's name, and the policy with its ratio and options; the key of a stored turn also holds the
tokens before it and the stored turn that it was computed behind. So no exact request, no other tenant, conversation
or ratio ever finds one.

Why not nodes of the radix tree under an extra key: a node's slots would then be shared with the exact prefix's
nodes, or begin in the middle of a prompt, and the tree knows neither. A stored turn is instead a record of the chunk
store, copied out of the pool when the turn ends and into the next turn's own slots: one copy in host memory under the
store's byte budget, evicted like any chunk, and no page, lock or slot that two requests share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from chunk_cache import Build, ChunkKey, hash_token_ids
from rag_pipeline.sglang_plugin.fusion.builds.capture import capture_chunk
from rag_pipeline.sglang_plugin.fusion.conversations.base import ConversationMemory, FinishedTurn
from rag_pipeline.sglang_plugin.fusion.conversations.turn_table import StoredTurn, TurnTable
from rag_pipeline.sglang_plugin.fusion.request.holdings import Capture, LeasedSpan
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


def namespace_of(state: RequestState, tenant: RadixNamespace) -> str:
    """Everything but tokens and model that a turn's KV depends on."""
    passage = state.request.passage is not False
    own = (tenant.salt, state.request.conversation, state.policy.identity, passage)
    method = state.request.make_attention()
    return repr(own if method is None else (*own, method.identity))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TurnPlace:
    """Where a turn begins that is to be kept, and what it was computed behind.

    Attributes
    ----------
    start : int
        First position that is kept.
    parent : int
        Number of the stored turn in front of it; 0 for the exact prefix alone.
    behind : tuple
        What its KV depends on besides the namespace and the tokens in front; goes into the key.
    is_exact : bool
        Plain prefill computed it, and all in front of it.
    is_alone : bool
        The conversation goes on from this turn only: all others of it are let go of.
    """

    start: int
    parent: int
    behind: tuple[object, ...]
    is_exact: bool = False
    is_alone: bool = False


class TurnMemory(ConversationMemory):
    """Every turn whole, as a tree: a turn was computed behind another one, or behind the exact prefix alone."""

    name = "turns"

    def __init__(self, runtime: FusionRuntime) -> None:
        super().__init__(runtime)
        self.table = TurnTable(runtime.store)

    def lease(self, state: RequestState, tenant: RadixNamespace) -> None:
        """Lease the longest chain of turns that the prompt goes through and every rank has."""
        runtime = self.runtime
        chain: list[StoredTurn] = []

        def offer() -> list[tuple[int, int, int]]:
            namespace = namespace_of(state, tenant)
            for turn, match in self.table.find(namespace, state.prompt, tenant=tenant.owner):
                found = runtime.store.acquire_matches(state.prompt, [match])
                if not found:
                    break  # what stands behind was computed over it
                chain.append(turn)
                state.lease([LeasedSpan(match=match, lease=found[0][1], is_turn=True)])
            return [(s.start, s.end, t.number) for s, t in zip(state.spans, chain, strict=True)]

        offers = runtime.group.gather(offer)
        agreed: list[tuple[StoredTurn, LeasedSpan]] = []
        for turn, span, same in zip(chain, state.spans, zip(*offers, strict=False), strict=False):
            if len({(start, number) for start, _, number in same}) > 1:
                break
            # A rank on which the chain goes on leaves a turn where the next begins.
            end = min(end for _, end, _ in same)
            run = span.match.clipped(span.start, end)
            agreed.append((turn, dataclasses.replace(span, match=run)))
        lost = chain[len(agreed) :]
        if not agreed or agreed[-1][1].end - state.radix_len < runtime.config.min_reused_tokens:
            agreed = []  # the tree's exact KV reaches as far
        state.set_turns(
            [
                dataclasses.replace(span, match=span.match.clipped(state.radix_len, span.end))
                for _, span in agreed
                if span.end > state.radix_len
            ],
            end=agreed[-1][1].end if agreed else 0,
            turn=agreed[-1][0].number if agreed else 0,
        )
        for turn in lost:
            # What one rank has lost all forget, or the next time that it is kept heads of two computations would mix.
            runtime.store.evict(turn.key)

    def keep(self, turn: FinishedTurn) -> bool:
        """Store what the turn computed behind its exact prefix and behind the turns that it loaded."""
        runtime, state, facts = self.runtime, turn.state, self.runtime.facts
        assert facts is not None
        owner, ids, end = turn.tenant.owner, turn.ids, turn.kv_len
        namespace = namespace_of(state, turn.tenant)
        place = self.place_of(turn, namespace)
        if place is None or end - place.start < runtime.config.min_reused_tokens:
            return False
        start = place.start
        key: ChunkKey | None = None

        def store() -> str:
            nonlocal key
            if not runtime.may_store(state.epoch, state.radix_len):
                return "not_stored"
            if not (place.is_alone or self.table.has_room(namespace, tenant=owner)):
                return "not_stored"
            context = facts.context(
                prefix_digest=hash_token_ids(ids[:start]), tenant=repr((namespace, *place.behind))
            )
            own = ChunkKey.of(context, ids[start:])
            build = runtime.store.begin_build(own, ids[start:], owner="turn", tenant=owner)
            if not isinstance(build, Build):
                return "known"  # the same turn was asked before
            with build:
                capture = Capture(start=start, end=end, base_position=start, build=build)
                record = capture_chunk(
                    facts.layout, turn.pool, facts.num_layers, turn.slots[:end], capture
                )
                if build.commit(record):
                    key = own
            return "stored" if key is not None else "not_stored"

        outcome: set[str] = set()
        try:
            # Kept by all or by none, so that the number of a turn means the same computation on every rank.
            outcome = set(runtime.group.gather(store))
        finally:
            if key is not None and outcome != {"stored"}:
                runtime.store.evict(key)
        if outcome == {"known"}:
            return False
        if outcome != {"stored"}:
            runtime.metrics.count("turns", "not_stored")
            return False
        assert key is not None
        if place.is_alone:
            self.table.drop(namespace, tenant=owner)
        self.table.add(namespace, ids, start, place.parent, key, tenant=owner, exact=place.is_exact)
        runtime.metrics.count("turns", "stored")
        return True

    def place_of(self, turn: FinishedTurn, namespace: str) -> TurnPlace | None:
        """Where the part of a finished turn begins that is kept; None to keep nothing. The same on every rank."""
        state = turn.state
        if state.exact_limit is None:
            return None
        start = max(state.exact_limit, state.turns_end)
        return TurnPlace(start=start, parent=state.turn, behind=(state.turn,))

    def forget(self, keys: Collection[ChunkKey] | None = None) -> None:
        """Forget all; of single records the table finds out by itself that they are gone."""
        if keys is None:
            self.table.clear()
