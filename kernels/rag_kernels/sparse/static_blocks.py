"""Patterns that depend on where rows and keys stand and on nothing else: one rule for prefill, pieces and decoding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall
from rag_kernels.attention.mask import BlockMask, RequestBlocks
from rag_kernels.attention.plan import PositionCausalPlan
from rag_kernels.host_copy import to_device
from rag_kernels.sparse.base import AttentionMethod
from rag_kernels.sparse.row_blocks import block_range, check_block, check_mask

_ENTRY_BYTES = 24
"""Of a mask while it is made: distances of blocks are 8 bytes, and a rule holds a few of them at a time."""


@dataclass(frozen=True, kw_only=True)
class StaticConfig:
    """Options that all static patterns have."""

    block: int = 256
    """Tokens of a block."""
    dense_layers: int = 0
    """Layers of each period that read every key; 0 for a sparse model throughout."""
    dense_period: int = 7
    """Layers of a period."""
    dense_offset: int = 0
    """First dense layer of each period."""

    def __post_init__(self) -> None:
        """Refuse options that name no pattern."""
        check_block(self.block)
        if not 0 <= self.dense_layers <= self.dense_period or self.dense_period < 1:
            raise ValueError(
                f"dense_layers is {self.dense_layers} of a dense_period of {self.dense_period}; "
                "give a period of at least 1, and 0 to all of its layers."
            )
        if not 0 <= self.dense_offset < self.dense_period:
            raise ValueError(
                f"dense_offset is {self.dense_offset}; it must be 0 to dense_period - 1, "
                f"{self.dense_period - 1}."
            )


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(StaticConfig):
    """Options of the patterns with a window of blocks and first blocks that everyone reads."""

    window: int = 5
    """Blocks of the window, the row's own counted."""
    sink: int = 1
    """First blocks of the prompt that every row reads."""

    def __post_init__(self) -> None:
        """Refuse options that name no pattern."""
        super().__post_init__()
        if self.window < 1:
            raise ValueError(
                f"window is {self.window} blocks; it must be at least 1, the row's own."
            )
        if self.sink < 0:
            raise ValueError(f"sink is {self.sink} blocks; it must be at least 0.")


class StaticBlocks(AttentionMethod):
    """A method whose blocks follow from positions alone, for all heads alike.

    Positions are absolute, so a prompt in pieces reads what it reads in one piece, fused rows what they read in a
    plain prompt, and a decoded token what it would read if it stood in the prompt.
    """

    acts_on_decode: ClassVar[bool] = True
    config: StaticConfig

    @abstractmethod
    def keeps(self, row: Tensor, key: Tensor) -> Tensor:
        """Whether rows of one block read the keys of another.

        Parameters
        ----------
        row, key : Tensor
            int64 indices of blocks, counted from the start of the prompt; shapes that broadcast. What it says of
            ``key >= row`` is not used: a row always reads its own block, and nothing behind it.

        Returns
        -------
        Tensor
            bool, of the broadcast shape.
        """

    @property
    def prefix_unit(self) -> int:
        """A token: blocks follow from the row's own position."""
        return 1

    def reads_all(self, layer: int) -> bool:
        """Whether a layer is one of the dense ones of its period."""
        at = (layer - self.config.dense_offset) % self.config.dense_period
        return at < self.config.dense_layers

    def allowed(self, first: int, last: int, device: torch.device | None = None) -> Tensor:
        """Blocks that the rows of query blocks ``first .. last`` read; bool ``[last - first + 1, last + 1]``."""
        row = torch.arange(first, last + 1, device=device)[:, None]
        key = torch.arange(last + 1, device=device)[None, :]
        return ((key < row) & self.keeps(row, key)) | (key == row)

    def decode_blocks(self, position: int) -> Tensor:
        """Blocks that a token at a position reads."""
        own = position // self.config.block
        return self.allowed(own, own)[0].nonzero().flatten()

    def prepare(self, plan: PositionCausalPlan, requests: Sequence[int]) -> BlockMask:
        """Make the mask, which all sparse layers share."""
        made: list[RequestBlocks | None] = [None] * len(plan.slots)
        size = self.config.block
        for request in requests:
            found = block_range(plan, request, size)
            if found is None:
                continue
            first, last = found
            check_mask(1, last - first + 1, last + 1, _ENTRY_BYTES)
            allowed = self.allowed(first, last)[None]
            made[request] = RequestBlocks(
                allowed=to_device(allowed, plan.device),
                on_host=allowed,
                query_block=size,
                key_block=size,
                first_query_block=first,
            )
        return BlockMask(requests=tuple(made))

    def mask(self, layer: int, call: AttentionCall, state: Any) -> BlockMask | None:
        """The pass's mask, None in a dense layer."""
        return None if self.reads_all(layer) else state
