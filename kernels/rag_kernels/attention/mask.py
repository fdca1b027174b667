"""Which blocks of keys the rows of an attention call may read: pure data, made by a method, read by kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.attention.plan import PositionCausalPlan


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RequestBlocks:
    """Blocks of one request. Blocks are cut by absolute position, so pieces of a prompt agree on them.

    A row at position ``p`` belongs to query block ``p // query_block``; the key at position ``j`` belongs to key block
    ``j // key_block``. Two rules stand above every entry: a row reads no key behind its own position, and it always
    reads the keys of the block that holds its own, so that no row is left without a key.

    Attributes
    ----------
    allowed : Tensor
        bool ``[H, Q, K]`` on the device of the plan. ``H`` is 1 for all heads alike, the number of key/value heads, or
        the number of query heads. Row ``i`` stands for query block ``first_query_block + i``, up to the block of the
        request's last row; ``K`` covers every key up to that row.
    query_block, key_block : int
        Tokens of a block.
    first_query_block : int
        Query blocks in front of the first row of the call need no entry.
    on_host : Tensor or None
        The same as ``allowed`` on the host, where it follows from positions alone: kernels that are planned on the host
        need not wait for the device then.
    """

    allowed: Tensor
    query_block: int
    key_block: int
    first_query_block: int = 0
    on_host: Tensor | None = None

    def rows(self, positions: Tensor) -> Tensor:
        """Key blocks that rows may read, their own block included; bool ``[H, R, K]``.

        Parameters
        ----------
        positions : Tensor
            Integer ``[R]`` on the device of the mask. Blocks behind a row's own are never set.
        """
        at = positions.long()
        own = (at // self.key_block)[:, None]
        block = torch.arange(self.allowed.shape[2], device=at.device)[None, :]
        allowed = self.allowed[:, at // self.query_block - self.first_query_block]
        return (allowed & (block <= own)) | (block == own)

    def keys_read(self, positions: Tensor) -> float:
        """Keys that rows at these positions read, all together, the mean over the heads; waits for the device.

        Parameters
        ----------
        positions : Tensor
            Integer ``[R]``.
        """
        at = positions.to(self.allowed.device, torch.int64)
        own = at // self.key_block
        before = torch.nn.functional.pad(self.allowed.to(torch.int64).cumsum(2), (1, 0))
        blocks = before[:, at // self.query_block - self.first_query_block, own]
        inside = int((at - own * self.key_block + 1).sum())
        read: float = blocks.sum().item() * self.key_block / self.allowed.shape[0]
        return read + inside

    def refuse(self, plan: PositionCausalPlan, request: int) -> str | None:
        """Reason why these blocks do not fit a request of a plan, or None."""
        if self.query_block < 1 or self.key_block < 1:
            return f"blocks of {self.query_block} rows and {self.key_block} keys; both must be at least 1"
        heads = (1, plan.num_kv_heads, plan.num_q_heads)
        if self.allowed.dtype != torch.bool or self.allowed.dim() != 3:
            return (
                f"allowed is {self.allowed.dtype} with {self.allowed.dim()} dimensions; give bool "
                "[heads, query blocks, key blocks]"
            )
        if self.allowed.shape[0] not in heads:
            return f"{self.allowed.shape[0]} heads; give one of {heads}"
        blocks = [block for block in plan.blocks if block.request == request]
        if not blocks:
            return None
        first, last = blocks[0].open_len - 1, blocks[-1].kv_len - 1
        stop = self.first_query_block + self.allowed.shape[1]
        if (
            not self.first_query_block
            <= first // self.query_block
            <= last // self.query_block
            < stop
        ):
            return (
                f"query blocks {self.first_query_block}..{stop - 1} for rows in blocks "
                f"{first // self.query_block}..{last // self.query_block}"
            )
        if last // self.key_block >= self.allowed.shape[2]:
            return f"{self.allowed.shape[2]} key blocks; rows need {last // self.key_block + 1}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockMask:
    """What the rows of a call may read, request by request.

    Attributes
    ----------
    requests : tuple of RequestBlocks or None
        One for each request of the plan; None where rows read every key up to their own.
    """

    requests: tuple[RequestBlocks | None, ...]

    def check(self, plan: PositionCausalPlan) -> None:
        """Refuse a mask that was not made for a plan.

        Raises
        ------
        ValueError
            One line: what does not fit.
        """
        if len(self.requests) != len(plan.slots):
            raise ValueError(
                f"the block mask has {len(self.requests)} requests; the plan was made for {len(plan.slots)}."
            )
        for request, blocks in enumerate(self.requests):
            reason = None if blocks is None else blocks.refuse(plan, request)
            if reason is not None:
                raise ValueError(f"block mask of request {request}: {reason}.")
