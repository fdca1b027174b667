"""The choice of SALE by operations of torch: for every device and option, and what ``native/estimate.cpp`` is checked with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall
from rag_kernels.paged import gather_kv
from rag_kernels.sparse.sale.estimate import KeyTable, largest_excess
from rag_kernels.sparse.sale.layout import RequestLayout, RowGroup
from rag_kernels.sparse.sale.selection import DENSE_TAU, LARGEST_TAU, kept_blocks, row_thresholds

if TYPE_CHECKING:
    from rag_kernels.sparse.sale.method import SaleConfig


def torch_choice(
    layout: RequestLayout,
    call: AttentionCall,
    slots: Tensor,
    tau: Tensor,
    allowed: Tensor,
    config: SaleConfig,
) -> None:
    """Fill the candidates of a request's mask.

    Parameters
    ----------
    layout : RequestLayout
        Rows of the request.
    call : AttentionCall
        Queries, keys and softmax scale.
    slots : Tensor
        int64 ``[keys]``: slot of each position.
    tau : Tensor
        fp32 ``[H]`` on the device of the queries.
    allowed : Tensor
        bool ``[H, Q, K]``, changed in place; row ``i`` stands for query block ``layout.first_block + i``. Entries that
        are no candidates are left as they are.
    config : SaleConfig
        Options of the method.
    """
    queries = call.sorted_q
    keys = gather_kv(call.k_pool, slots[: layout.num_keys]).float().transpose(0, 1).contiguous()
    table = KeyTable(
        keys[:, : max(layout.groups[-1].num_candidates, config.min_tokens)],
        num_sink=config.block_k,
        num_frozen=config.min_tokens,
        granularity=config.granularity,
        is_estimated=config.estimate == "int4",
    )
    for group in layout.groups:
        kept = _kept(group, queries, call.scale, keys, table, tau, config).flatten(0, 1)
        kept[tau.isinf()] = False
        kept[..., 0] = True
        kept[tau < DENSE_TAU] = True
        allowed[:, group.blocks - layout.first_block, : kept.shape[-1]] = kept


def _kept(
    group: RowGroup,
    queries: Tensor,
    scale: float,
    keys: Tensor,
    table: KeyTable,
    tau: Tensor,
    config: SaleConfig,
) -> Tensor:
    """Candidate blocks that the rows of a group keep, bool ``[N, heads of one key head, B, blocks]``."""
    heads, _, dim = keys.shape
    blocks, rows = group.rows.shape
    # [B, W, N, G, D] -> [N, G * B, W, D]
    q = queries[group.rows].float().view(blocks, rows, heads, -1, dim)
    q = q.permute(2, 3, 0, 1, 4).reshape(heads, -1, rows, dim)
    threshold = _thresholds(group, q, scale, keys, tau, config)
    counts = group.counts.repeat(q.shape[1] // blocks)
    excess = largest_excess(q, threshold, table, group.num_candidates, config.granularity, counts)
    kept = kept_blocks(excess, config.block_k)
    return kept.view(heads, -1, blocks, kept.shape[-1])


def _thresholds(
    group: RowGroup, q: Tensor, scale: float, keys: Tensor, tau: Tensor, config: SaleConfig
) -> Tensor:
    """fp32 ``[N, G * B, W]``: from the logits of the rows with the sink and their neighbourhood."""
    heads = keys.shape[0]
    sink, local = keys[:, : config.block_k], keys[:, group.num_candidates : group.end]
    read = torch.cat((sink, local), dim=1).transpose(1, 2)
    logits = torch.bmm(q.flatten(1, 2), read).view(heads, -1, *group.rows.shape, read.shape[2])
    at = torch.arange(group.num_candidates, group.end, device=q.device)
    logits[..., sink.shape[1] :].masked_fill_(at > group.positions[..., None], -math.inf)
    by_head = tau.clamp(DENSE_TAU, LARGEST_TAU).view(heads, -1, 1, 1)
    return row_thresholds(logits, by_head, scale).view(heads, -1, group.rows.shape[1])
