"""One request of a fused forward: what is loaded, what is computed, and which rows a pass takes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from chunk_cache.policies import ReuseLayout
from rag_pipeline.sglang_plugin.fusion import plan as planning
from rag_pipeline.sglang_plugin.fusion.batch_view import RequestRows
from rag_pipeline.sglang_plugin.fusion.plan import Piece
from rag_pipeline.sglang_plugin.fusion.request_state import RequestState


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlanEntry:
    """One request of a batch that fusion has business with."""

    index: int
    req: Any
    state: RequestState
    piece: Piece


class FusedItem:
    """Working state of one fused request during a forward.

    Attributes
    ----------
    entry : PlanEntry
        The request and its piece of the prompt.
    layout : ReuseLayout
        What the policy sees of it.
    kv_slots : Tensor
        int64 ``[piece.end]`` on the device; slot ``j`` holds position ``j``.
    prompt, fresh, candidates : Tensor
        int64 on the host: token ids; positions that are computed in any case; reused positions still to choose from.
    chosen : Tensor or None
        Reused positions to compute; None until a probing pass has been run.
    kept : list of int
        Candidates left after each deviation check.
    """

    __slots__ = ("candidates", "chosen", "entry", "fresh", "kept", "kv_slots", "layout", "prompt")

    def __init__(
        self,
        entry: PlanEntry,
        layout: ReuseLayout,
        kv_slots: Tensor,
        prompt: Tensor,
        fresh: Tensor,
    ) -> None:
        self.entry = entry
        self.layout = layout
        self.kv_slots = kv_slots
        self.prompt = prompt
        self.fresh = fresh
        self.chosen = planning.early_rows(entry.state.policy, layout, entry.piece)
        self.candidates = layout.reused_positions()
        self.kept: list[int] = []

    def rows(self, positions: Tensor, *, keeps_last: bool = False) -> RequestRows:
        """Rows of this request at rising positions."""
        return RequestRows(
            index=self.entry.index,
            positions=positions,
            ids=self.prompt[positions].to(self.kv_slots.device),
            kv_slots=self.kv_slots,
            keeps_last=keeps_last,
        )

    @property
    def keeps_last(self) -> bool:
        """Whether the last row only ends a piece inside a chunk: it must not change that chunk's KV."""
        piece, last = self.entry.piece, self.entry.piece.end - 1
        chosen = self.chosen is not None and bool((self.chosen == last).any())
        loaded = any(start <= last < end for start, end in self.entry.state.loads)
        return loaded and not chosen and not piece.is_last
