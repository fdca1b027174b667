"""Methods that score blocks by the queries of the pass: what they share is the rows, and the choice by the scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall
from rag_kernels.attention.mask import BlockMask, RequestBlocks
from rag_kernels.attention.plan import PositionCausalPlan
from rag_kernels.paged import gather_kv
from rag_kernels.sparse.base import AttentionMethod
from rag_kernels.sparse.row_blocks import block_range, check_block, check_mask

_ENTRY_BYTES = 16
"""Of a mask while it is made: scores, their order, and what is chosen."""


@dataclass(frozen=True, kw_only=True)
class ScoredConfig:
    """Options that all methods with scores have."""

    block: int = 128
    """Tokens of a block."""
    dense_layers: int = 0
    """First layers that read every key."""

    def __post_init__(self) -> None:
        """Refuse options that name no choice."""
        check_block(self.block)
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers is {self.dense_layers}; it must be at least 0.")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RequestRows:
    """Rows of one request in one layer, and its keys.

    Attributes
    ----------
    q : Tensor
        ``[R, Hq, D]`` fp32 rotated queries, by rising position.
    positions : Tensor
        int64 ``[R]``.
    k : Tensor
        ``[N, Hk, D]`` fp32 rotated keys of positions ``0 .. N - 1``, up to the last row's own.
    scale : float
        Softmax scale.
    block : int
        Tokens of a block.
    first, last : int
        Blocks of the first and the last row.
    """

    q: Tensor
    positions: Tensor
    k: Tensor
    scale: float
    block: int
    first: int
    last: int

    @property
    def num_query_blocks(self) -> int:
        """Blocks from the first row's to the last row's; some may hold no row."""
        return self.last - self.first + 1

    @property
    def query_block(self) -> Tensor:
        """Block of each row, counted from the first row's; int64 ``[R]``."""
        return self.positions // self.block - self.first

    @property
    def is_before(self) -> Tensor:
        """Whether a key block lies before a query block; bool ``[Q, K]``. Own blocks are read whatever is chosen."""
        device = self.positions.device
        row = torch.arange(self.first, self.last + 1, device=device)
        return torch.arange(self.last + 1, device=device)[None, :] < row[:, None]


class ScoredBlocks(AttentionMethod):
    """Chooses blocks per layer and head from queries and keys.

    It looks at the rows of the pass: a prompt in pieces may read other blocks than in one piece where a piece ends
    within a block. Decoding stays dense.
    """

    config: ScoredConfig
    weighs_logits = True

    @abstractmethod
    def choose(self, rows: RequestRows) -> Tensor:
        """Blocks that each block of rows reads.

        Parameters
        ----------
        rows : RequestRows
            At least one.

        Returns
        -------
        Tensor
            bool ``[H, Q, K]``, ``H`` as in :class:`~rag_kernels.attention.RequestBlocks`; ``Q`` and ``K`` as in
            :attr:`RequestRows.is_before`. What it says of a row's own block and of those behind is not used.
        """

    def reads_all(self, layer: int) -> bool:
        """Whether a layer is one of the first, dense ones."""
        return layer < self.config.dense_layers

    def prepare(self, plan: PositionCausalPlan, requests: Sequence[int]) -> dict[int, Any]:
        """Find the blocks of each request's rows."""
        found = {request: block_range(plan, request, self.config.block) for request in requests}
        return {request: blocks for request, blocks in found.items() if blocks is not None}

    def mask(
        self, layer: int, call: AttentionCall, state: dict[int, tuple[int, int]]
    ) -> BlockMask | None:
        """Score and choose, request by request."""
        if self.reads_all(layer) or not state:
            return None
        plan, size = call.plan, self.config.block
        made: list[RequestBlocks | None] = [None] * len(plan.slots)
        q = call.sorted_q
        for request, (first, last) in state.items():
            check_mask(plan.num_q_heads, last - first + 1, last + 1, _ENTRY_BYTES)
            lo, hi = plan.row_starts[request], plan.row_starts[request + 1]
            positions = plan.sorted_positions[lo:hi].long()
            slots = plan.slots[request][: self._num_keys(plan, request)]
            rows = RequestRows(
                q=q[lo:hi].float(),
                positions=positions,
                k=gather_kv(call.k_pool, slots).float(),
                scale=call.scale,
                block=size,
                first=first,
                last=last,
            )
            made[request] = RequestBlocks(
                allowed=self.choose(rows),
                query_block=size,
                key_block=size,
                first_query_block=first,
            )
        return BlockMask(requests=tuple(made))

    @staticmethod
    def _num_keys(plan: PositionCausalPlan, request: int) -> int:
        return max(block.kv_len for block in plan.blocks if block.request == request)


def most_scored(scores: Tensor, may: Tensor, counts: Tensor) -> Tensor:
    """The blocks with the highest scores; of equal ones the earlier.

    Parameters
    ----------
    scores : Tensor
        ``[H, Q, K]``.
    may : Tensor
        bool ``[Q, K]``: blocks that may be chosen.
    counts : Tensor
        Integer ``[Q]``: how many, at most, for each block of rows.

    Returns
    -------
    Tensor
        bool ``[H, Q, K]``.
    """
    order = scores.masked_fill(~may, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    is_chosen = torch.arange(scores.shape[-1], device=scores.device) < counts[:, None]
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return chosen.scatter_(-1, order, is_chosen.expand_as(scores)) & may


def most_mass(mass: Tensor, share: Tensor) -> Tensor:
    """The fewest blocks that hold a share of the mass, the heaviest first.

    Parameters
    ----------
    mass : Tensor
        ``[H, Q, K]``, not negative; 0 for blocks that may not be chosen.
    share : Tensor
        ``[H, Q, 1]``: share of each row's sum, 0 to 1.

    Returns
    -------
    Tensor
        bool ``[H, Q, K]``. The block with which the share is reached is one of them.
    """
    heavy, order = mass.sort(dim=-1, descending=True, stable=True)
    before = heavy.cumsum(dim=-1) - heavy
    is_chosen = (before < share * mass.sum(dim=-1, keepdim=True)) & (heavy > 0)
    return torch.zeros(mass.shape, dtype=torch.bool, device=mass.device).scatter_(
        -1, order, is_chosen
    )
