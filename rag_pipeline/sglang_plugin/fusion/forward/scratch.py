"""Scratch slots: room in the paged pool for tokens that stand behind a prompt during one forward, a draft's for example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunk_cache.policies.signals import ProbedRequest


def borrow_slots(runner: Any, requests: int, tokens: int) -> Tensor | None:
    """Free slots of the paged pool, for the time of this forward only.

    They stay on the free list. Whoever is given them later writes them in a later forward, which the device runs
    behind this one, and nothing reads a slot before it was written; taking them and giving them back would change the
    allocator's lists on the stream of the forward, beside the scheduler's.

    Returns
    -------
    Tensor or None
        int64 ``[requests, tokens]``; None where so many are not free.
    """
    allocator = runner.token_to_kv_pool_allocator
    pages, size = allocator.get_all_free_pages(), int(allocator.page_size)
    needed = requests * tokens
    if pages.numel() * size < needed:
        return None
    first = pages[: -(-needed // size)].to(torch.int64)
    slots = first[:, None] * size + torch.arange(size, device=first.device)
    return slots.flatten()[:needed].view(requests, tokens)


def fits(runner: Any, requests: Sequence[ProbedRequest], tokens: int) -> bool:
    """Whether so many tokens behind every prompt stay within the positions that the model knows."""
    longest = max(int(request.kv_slots.numel()) for request in requests)
    return longest + tokens <= int(runner.model_config.context_len)
