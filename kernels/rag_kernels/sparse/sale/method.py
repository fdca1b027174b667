"""SALE: rows keep the blocks whose 4-bit logits weigh enough against the sink and the neighbourhood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall
from rag_kernels.attention.mask import BlockMask, RequestBlocks
from rag_kernels.attention.plan import PositionCausalPlan
from rag_kernels.host_copy import to_device
from rag_kernels.native.estimate import native_choice
from rag_kernels.paged import gather_kv
from rag_kernels.sparse.base import AttentionMethod
from rag_kernels.sparse.row_blocks import SMALLEST_BLOCK, check_mask
from rag_kernels.sparse.sale.layout import RequestLayout, lay_out_rows
from rag_kernels.sparse.sale.quantization import Granularity
from rag_kernels.sparse.sale.selection import DENSE_TAU, LARGEST_TAU
from rag_kernels.sparse.sale.smoothing import mean_of_tokens
from rag_kernels.sparse.sale.thresholds import ThresholdTable, find_table, load_table
from rag_kernels.sparse.sale.torch_choice import torch_choice

AUTO = "auto"
FALLBACK_TAU = 0.0005
"""For every head of a model that was not calibrated."""


@dataclass(frozen=True, kw_only=True)
class SaleConfig:
    """Options of SALE; the defaults are the paper's.

    Attributes
    ----------
    thresholds : str
        ``auto``: the table that was calibrated for the loaded weights, else :data:`FALLBACK_TAU`. A number: for every
        head; 0 reads everything, ``inf`` only sink and neighbourhood. Otherwise the name of a table.
    block_q, block_k : int
        Rows and keys of a block.
    local_window : int
        Keys in front of a block of rows that are always read.
    segment : int
        Candidates are a whole number of these; a multiple of both blocks.
    min_tokens : int
        Rows at earlier positions read everything, and mean and scale of the keys are those of as many first keys.
    granularity : {'token', 'thread_group'}
        Who shares a 4-bit scale.
    estimate : {'int4', 'exact'}
        Logits from 4-bit integers, or in fp32, to compare with.
    """

    thresholds: str = AUTO
    block_q: int = 64
    block_k: int = 32
    local_window: int = 128
    segment: int = 128
    min_tokens: int = 1024
    granularity: Granularity = "token"
    estimate: Literal["int4", "exact"] = "int4"

    def __post_init__(self) -> None:
        if min(self.block_q, self.block_k, self.segment) < SMALLEST_BLOCK:
            raise ValueError(
                f"block_q {self.block_q}, block_k {self.block_k} and segment {self.segment} must be at least "
                f"{SMALLEST_BLOCK}."
            )
        if self.segment % self.block_q or self.segment % self.block_k:
            raise ValueError(
                f"segment {self.segment} is not a multiple of block_q {self.block_q} and block_k {self.block_k}."
            )
        if self.local_window < 0 or self.min_tokens <= self.block_k:
            raise ValueError(
                f"local_window {self.local_window} must be at least 0 and min_tokens {self.min_tokens} more "
                f"than block_k {self.block_k}."
            )


class SaleAttention(AttentionMethod):
    """Sparse attention from low-bit estimates, for long prompts.

    Each layer of a prompt is gone through three times: keys and queries are smoothed and quantised; every logit is
    estimated and compared with a threshold, see :mod:`~rag_kernels.sparse.sale.selection`; the blocks that are kept
    are computed by whatever kernel computes the call. Masks are per query head.

    SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling,
    https://arxiv.org/abs/2505.24179. Where this deviates: the mean of the queries is that of their block and that of
    the keys that of the first ``min_tokens``, where the paper takes both over the prompt, so that pieces of a prompt
    choose alike; 4-bit values are put on common scales of 7 bits, see :mod:`~rag_kernels.sparse.sale.estimate`; the
    two-pass form only; 4-bit keys are made anew for each pass over a prompt. Making them is 5% of an estimate, and 9%
    where 8,192 tokens come in eight pieces; a table of them by slot would save no more than that, as keys in full
    precision are read in any case (for the mean of the queries), and hold 15% of the pool's bytes more. On a CPU with
    a compiler the choice is made by ``native/estimate.cpp``, which stores no logits;
    :mod:`~rag_kernels.sparse.sale.estimate` is its reference, and what other devices and options use.

    Measured on SmolLM2-135M with its calibrated thresholds, 3,072 tokens of prose: 53% of the blocks kept, the NLL of the
    rows behind the first 1,024 changed by -0.05% (+6.5% with sink and neighbourhood alone), KL to dense 0.004. At the
    same number of blocks the rows' attention mass is 0.985 of all, against 0.977 where block means choose as many for
    each row, and 0.969 at random; with the counts of SALE, block means have 0.986.

    Time (CPU time, AMD EPYC with AVX512-VNNI, kernel ``cpp``, its own dense call being 1), queries and keys of
    SmolLM2-135M over a text: 8,192 tokens, layers 3, 11, 18 and 26: estimate 0.16 and attention to what is kept 0.41 at a
    density of 0.32; 16,384 tokens, twice what the model was trained for, layers 1 and 3: 0.15 and 0.35 at 0.28. Two
    threads need as much time together as one does alone.

    Pieces of a prompt that begin at a multiple of ``block_q`` choose the blocks that the whole prompt would. Where
    the call has a window or a cap on its logits, everything is read. On a rank of a tensor-parallel group a head has
    the smallest threshold of those heads that it may be.
    """

    name = "sale"
    config_type = SaleConfig
    config: SaleConfig
    weighs_logits = True

    def __init__(self, config: SaleConfig, table: ThresholdTable | None = None) -> None:
        super().__init__(config)
        self._table = table
        self._tau = FALLBACK_TAU
        if table is not None or config.thresholds == AUTO:
            return
        try:
            self._tau = float(config.thresholds)
        except ValueError:
            self._table = load_table(config.thresholds)
        if not self._tau >= 0:
            raise ValueError(f"thresholds are {config.thresholds}; a number must be at least 0.")

    @property
    def identity(self) -> str:
        """Name, every option, and what the thresholds are."""
        found = self._tau if self._table is None else self._table.digest
        return f"{self.name} {self.config!r} {found}"

    @property
    def prefix_unit(self) -> int:
        """A block of rows: they choose together, by keys in front of them and their own."""
        return self.config.block_q

    @property
    def table(self) -> ThresholdTable | None:
        """Thresholds by head; None where one is for all."""
        return self._table

    def for_model(self, fingerprint: str) -> AttentionMethod:
        """Take the table of the loaded weights.

        Raises
        ------
        ValueError
            The table that was named is that of other weights.
        """
        if self.config.thresholds != AUTO:
            if self._table is not None and self._table.fingerprint != fingerprint:
                raise ValueError(
                    f"thresholds {self.config.thresholds!r} were calibrated for other weights "
                    f"({self._table.model}); give auto or a number, or calibrate this model."
                )
            return self
        table = find_table(fingerprint)
        return self if table == self._table else SaleAttention(self.config, table)

    def head_thresholds(self, layer: int, num_heads: int) -> Tensor:
        """fp32 ``[num_heads]`` on the host.

        Raises
        ------
        ValueError
            The table is not one of a model of this shape.
        """
        if self._table is None:
            return torch.full((num_heads,), self._tau)
        tau = self._table.tau
        if layer >= len(tau) or len(tau[0]) % num_heads:
            raise ValueError(
                f"thresholds for {len(tau)} layers of {len(tau[0])} heads; layer {layer} with {num_heads} is none."
            )
        return torch.tensor(tau[layer]).view(-1, num_heads).amin(dim=0)

    def prepare(
        self, plan: PositionCausalPlan, requests: Sequence[int]
    ) -> dict[int, RequestLayout | None]:
        """Cut the rows of each request."""
        options = {
            name: getattr(self.config, name)
            for name in ("block_q", "block_k", "local_window", "segment", "min_tokens")
        }
        positions = plan.sorted_on_host
        made: dict[int, RequestLayout | None] = {}
        for request in requests:
            lo, hi = plan.row_starts[request], plan.row_starts[request + 1]
            made[request] = lay_out_rows(positions[lo:hi], lo, plan.device, **options)
        return made

    def mask(
        self, layer: int, call: AttentionCall, state: Mapping[int, RequestLayout | None]
    ) -> BlockMask | None:
        """Estimate and choose."""
        if call.sliding_window is not None or call.logit_cap:
            return None
        tau = self.head_thresholds(layer, call.plan.num_q_heads)
        if not any(state.values()) or bool((tau < DENSE_TAU).all()):
            return None
        made: list[RequestBlocks | None] = [None] * len(call.plan.slots)
        tau = to_device(tau, call.q_RNH.device)
        for request, layout in state.items():
            if layout is not None:
                made[request] = self._choose(layout, call, call.plan.slots[request], tau)
        return BlockMask(requests=tuple(made))

    def _choose(
        self,
        layout: RequestLayout,
        call: AttentionCall,
        slots: Tensor,
        tau: Tensor,
    ) -> RequestBlocks:
        config, plan = self.config, call.plan
        key_blocks = -(-layout.num_keys // config.block_k)
        check_mask(plan.num_q_heads, layout.num_blocks, key_blocks, 1)
        allowed = torch.ones(
            (plan.num_q_heads, layout.num_blocks, key_blocks),
            dtype=torch.bool,
            device=call.q_RNH.device,
        )
        if not self._choose_natively(layout, call, slots, tau, allowed):
            torch_choice(layout, call, slots, tau, allowed, self.config)
        return RequestBlocks(
            allowed=allowed,
            query_block=config.block_q,
            key_block=config.block_k,
            first_query_block=layout.first_block,
        )

    def _choose_natively(
        self,
        layout: RequestLayout,
        call: AttentionCall,
        slots: Tensor,
        tau: Tensor,
        allowed: Tensor,
    ) -> bool:
        config = self.config
        if config.estimate != "int4" or config.granularity != "token":
            return False
        frozen = gather_kv(call.k_pool, slots[: config.min_tokens]).float().transpose(0, 1)
        return native_choice(
            layout,
            call,
            slots,
            mean_of_tokens(frozen),
            tau,
            allowed,
            key_block=config.block_k,
            dense_tau=DENSE_TAU,
            largest_tau=LARGEST_TAU,
        )
