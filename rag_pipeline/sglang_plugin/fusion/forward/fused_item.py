"""One request of a fused forward: what is loaded, what is computed, and which rows a pass takes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunk_cache.policies import ReuseLayout, ScoredPolicy
from rag_kernels import to_device
from rag_pipeline.sglang_plugin.fusion.forward import plan as planning
from rag_pipeline.sglang_plugin.fusion.forward.batch_view import RequestRows
from rag_pipeline.sglang_plugin.fusion.forward.plan import Piece
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchEntry:
    """One request of a batch that fusion has business with."""

    index: int
    req: Any
    state: RequestState
    piece: Piece

    @property
    def protected_len(self) -> int:
        """Leading tokens that this forward must not write.

        The radix tree holds them, or will: what earlier pieces computed in front of the first loaded token.
        """
        own = self.piece.start
        if self.state.exact_limit is not None:
            own = min(own, self.state.exact_limit)
        return max(own, int(self.req.kv.cache_protected_len))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """What fusion has to do with one batch.

    Attributes
    ----------
    entries : tuple of BatchEntry
        Its requests that load, store or report.
    refused : str
        Why nothing in it may be fused, see :func:`~.support.refuse_batch`; empty otherwise.
    """

    entries: tuple[BatchEntry, ...]
    refused: str

    @property
    def fused(self) -> list[BatchEntry]:
        """Entries that load something, or whose rows do not read every key."""
        return [entry for entry in self.entries if entry.state.is_fused]


def plan_item(
    state: RequestState, piece: Piece, *, num_layers: int, prompt_len: int, qkv_share: float
) -> tuple[ReuseLayout, Tensor]:
    """Layout of a resolved request as its policy sees it, and the positions of the piece that are computed anyway."""
    # Earlier turns are no more up to a policy than the exact prefix is.
    exact = state.turns_end or planning.exact_end(
        [(s.start, s.end, s.is_exact) for s in state.spans], state.radix_len
    )
    fresh = planning.fresh_positions(state.loads, piece)
    # Those of earlier pieces count as well: they are computed once more, and the choice is that of a single piece.
    whole = dataclasses.replace(piece, start=state.radix_len)
    layout = planning.make_layout(
        state.loads,
        num_layers=num_layers,
        prompt_len=prompt_len,
        radix_len=state.radix_len,
        exact_len=min(exact, prompt_len),
        qkv_share=qkv_share,
        scoring_rows=int(planning.fresh_positions(state.loads, whole).numel()),
        cost=state.cost,
    )
    return layout, fresh


class FusedItem:
    """Working state of one fused request during a forward; a :class:`~chunk_cache.policies.ProbedRequest`.

    Attributes
    ----------
    entry : BatchEntry
        The request and its piece of the prompt.
    layout : ReuseLayout
        What the policy sees of it.
    kv_slots : Tensor
        int64 ``[piece.end]`` on the device; slot ``j`` holds position ``j``.
    prompt, fresh, candidates : Tensor
        int64 on the host: token ids; positions that are computed in any case; reused positions of the layout.
    chosen : Tensor or None
        Reused positions to compute; None until a probing pass has been run.
    outdated : Tensor
        int64, host: what earlier pieces computed over reused KV that this forward may replace.
    """

    __slots__ = (
        "candidates",
        "chosen",
        "entry",
        "fresh",
        "kv_slots",
        "layout",
        "outdated",
        "prompt",
    )

    def __init__(
        self,
        entry: BatchEntry,
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
        piece = entry.piece
        self.chosen = planning.early_rows(entry.state.policy, layout, piece)
        self.candidates = layout.reused_positions()
        changing = self.candidates if self.chosen is None else self.chosen
        self.outdated = planning.outdated_positions(
            entry.state.loads, int(changing[0]) if changing.numel() else piece.start, piece
        )

    @property
    def policy(self) -> ScoredPolicy:
        """The policy of a request that waits for its signal."""
        policy = self.entry.state.policy
        assert isinstance(policy, ScoredPolicy)
        return policy

    @property
    def chunk_spans(self) -> Sequence[tuple[int, int]]:
        """Where the prompt's chunks stand: as the client said, or what is loaded."""
        return self.entry.state.request.spans or self.entry.state.loads

    def with_fresh(self, reused: Tensor) -> Tensor:
        """Positions to compute for these reused ones to be as in a prompt of one piece; int64, rising."""
        return planning.union_rows(self.fresh, torch.cat([self.outdated, reused]))

    def rows(self, positions: Tensor, *, keeps_last: bool = False) -> RequestRows:
        """Rows of this request at rising positions."""
        return RequestRows(
            index=self.entry.index,
            positions=positions,
            ids=to_device(self.prompt[positions], self.kv_slots.device),
            kv_slots=self.kv_slots,
            keeps_last=keeps_last,
            method=self.entry.state.method,
        )

    def rows_behind(self, ids: Sequence[int], slots: Tensor) -> RequestRows:
        """Rows of tokens behind the prompt, as many of the slots as there are tokens; for a request's last piece."""
        kv_slots = torch.cat([self.kv_slots, slots[: len(ids)].to(self.kv_slots.device)])
        return RequestRows(
            index=self.entry.index,
            positions=torch.arange(int(kv_slots.numel()) - len(ids), int(kv_slots.numel())),
            ids=to_device(torch.tensor(list(ids), dtype=torch.int64), kv_slots.device),
            kv_slots=kv_slots,
            method=self.entry.state.method,
        )

    @property
    def keeps_last(self) -> bool:
        """Whether the last row only ends a piece inside a chunk: it must not change that chunk's KV."""
        piece, last = self.entry.piece, self.entry.piece.end - 1
        chosen = self.chosen is not None and bool((self.chosen == last).any())
        loaded = any(start <= last < end for start, end in self.entry.state.loads)
        return loaded and not chosen and not piece.is_last
