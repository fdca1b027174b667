"""Conversations that go on past the context window with their KV (CachedAttention, arXiv 2403.19708, section 3.4).

Past the window a client cuts the oldest turns. Every token behind the cut then stands at a smaller position, so the
radix tree and a store that compares positions find nothing. Here the turns that stay are found at their old place and
loaded at the new one: keys are rotated by the difference, values are taken as they are ("decoupled KV cache
truncation").

Deviations from the paper: keys are stored rotated and moved by the difference of positions, which is the same rotation
up to rounding; the part in front of the first turn stays, so that the first tokens of the prompt, which attract
attention, are those that the model saw; what was moved is stored once more where it stands now, and the turns from
before the cut are let go of.

Moved KV is approximate: behind layer 0 it still holds something of the turns that were cut. It is never marked exact,
and the radix tree gets nothing behind its first token.
"""

from __future__ import annotations

import hashlib

from rag_pipeline.sglang_plugin.fusion.conversations.base import FinishedTurn
from rag_pipeline.sglang_plugin.fusion.conversations.stored_turns import MovedRun
from rag_pipeline.sglang_plugin.fusion.conversations.turn_places import TurnPlace, through_of
from rag_pipeline.sglang_plugin.fusion.conversations.turns import TurnMemory
from rag_pipeline.sglang_plugin.fusion.request.holdings import LeasedSpan
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState


class CachedAttentionMemory(TurnMemory):
    """Every turn whole, exact ones too; a prompt whose oldest turns were cut loads the others moved."""

    name = "cached_attention"

    def lease(self, state: RequestState, tenant: RadixNamespace) -> None:
        """Lease turns where they stand; behind them, or instead of them, turns that a cut has moved."""
        super().lease(state, tenant)
        runtime, held = self.runtime, state.spans
        low = max(state.radix_len, state.turns_end)
        least = runtime.config.min_reused_tokens
        if state.prompt.size - low < least:
            return  # on every rank or on none: all ranks know the same numbers
        moved: list[LeasedSpan] = []

        def offer() -> tuple[int, int, int, int] | None:
            run = self._find(state, tenant, low)
            if run is None:
                return None
            for match in run.matches:
                if match.prompt_end <= low:
                    continue
                clipped = match.clipped(low, match.prompt_end)
                found = runtime.store.acquire_matches(state.prompt, [clipped])
                if not found:
                    break
                span = LeasedSpan(match=clipped, lease=found[0][1], is_turn=True)
                state.lease([span])
                moved.append(span)
            if not moved:
                return None
            return run.number, run.distance, moved[0].start, moved[-1].end

        offers = runtime.group.gather(offer)
        agreed = offers[0] if len(set(offers)) == 1 else None
        if agreed is None or agreed[3] - agreed[2] < least:
            state.retain(held)
            return
        state.set_turns([*held, *moved], end=agreed[3], turn=-agreed[0])
        runtime.metrics.count("turns", "tokens_moved", agreed[3] - agreed[2])

    def _find(self, state: RequestState, tenant: RadixNamespace, low: int) -> MovedRun | None:
        namespace = self.known(state, tenant)
        run = self.table.find_moved(
            namespace,
            state.prompt,
            tenant=tenant.owner,
            at_least=self.runtime.config.min_reused_tokens,
        )
        return run if run is not None and run.matches[-1].prompt_end > low else None

    def places_of(self, turn: FinishedTurn, namespace: str) -> list[TurnPlace]:
        """Behind the stored turns that the turn goes on from; of a cut conversation all that is left of it."""
        state = turn.state
        if state.turn >= 0:
            return super().places_of(turn, namespace)
        first, through = state.request.prefix_len, through_of(self.runtime, state)
        moved = hashlib.blake2b(f"{-state.turn:x} {through}".encode(), digest_size=32).hexdigest()
        return [TurnPlace(start=first, end=turn.kv_len, through=moved, is_alone=True)]
