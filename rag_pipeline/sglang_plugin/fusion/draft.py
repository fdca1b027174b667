"""A draft of the answer, decoded over the loaded KV: its attention shows what the answer will look at.

The question's rows show where an answer stands; what is copied from there, and what follows it, is looked at by the
answer's own tokens. Pseudo queries of this kind were proposed for evicting KV (Lookahead Q-Cache, arXiv 2505.20334);
here they choose what is recomputed. Every token of the draft is one more pass over the model with one row a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rag_pipeline.sglang_plugin.fusion.batch_view import RequestRows
from rag_pipeline.sglang_plugin.fusion.fused_item import FusedItem


def borrow_slots(runner: Any, requests: int, tokens: int) -> Tensor | None:
    """Free slots of the paged pool for the KV of drafts, for the time of this forward only.

    They stay on the free list. Whoever is given them later writes them in a later forward, which the device runs
    behind this one, and nothing reads a slot before it was written; taking them and giving them back would change the
    allocator's lists on the stream of the forward, beside the scheduler's.

    Returns
    -------
    Tensor or None
        int64 ``[requests, tokens]``; None where so many are not free, or the allocator has no list of free pages.
    """
    allocator = runner.token_to_kv_pool_allocator
    pages, size = getattr(allocator, "free_pages", None), int(allocator.page_size)
    needed = requests * tokens
    if not isinstance(pages, Tensor) or pages.numel() * size < needed:
        return None
    first = pages[: -(-needed // size)].to(torch.int64)
    slots = first[:, None] * size + torch.arange(size, device=first.device)
    return slots.flatten()[:needed].view(requests, tokens)


def fits(runner: Any, members: Sequence[FusedItem], tokens: int) -> bool:
    """Whether every draft stays within the positions that the model knows."""
    longest = max(int(item.kv_slots.numel()) for item in members)
    return longest + tokens <= int(runner.model_config.context_len)


def rows_of_step(
    members: Sequence[FusedItem], ids: Tensor, scratch: Tensor, step: int
) -> list[RequestRows]:
    """One row a request: the draft's token number `step`, behind the prompt and the draft so far.

    Parameters
    ----------
    members : sequence of FusedItem
        Requests in their last piece.
    ids : Tensor
        int64 ``[requests]``: the tokens.
    scratch : Tensor
        From :func:`borrow_slots`.
    step : int
        From 0.
    """
    rows = []
    for index, item in enumerate(members):
        slots = torch.cat([item.kv_slots, scratch[index, : step + 1].to(item.kv_slots.device)])
        rows.append(
            RequestRows(
                index=item.entry.index,
                positions=torch.tensor([int(slots.numel()) - 1]),
                ids=ids[index : index + 1].to(slots.device),
                kv_slots=slots,
            )
        )
    return rows
