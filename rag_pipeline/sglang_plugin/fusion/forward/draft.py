"""A draft of the answer that scores beside the question: its attention shows what the answer will look at.

The question's rows show where an answer stands; what is copied from there, and what follows it, is looked at by the
answer's own tokens. Pseudo queries of this kind were proposed for evicting KV (Lookahead Q-Cache, arXiv 2505.20334);
here they choose what is recomputed. Only the first token is decoded, over the KV as loaded. The others are looked up
in the chunks, as prompt lookup decoding does: decoding them one by one scored no better and cost one pass each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rag_pipeline.sglang_plugin.fusion.forward.batch_view import RequestRows
from rag_pipeline.sglang_plugin.fusion.forward.fused_item import FusedItem

_NEAR = 6
"""Attention is summed over so many positions before, and after, a token that may begin the answer."""


def borrow_slots(runner: Any, requests: int, tokens: int) -> Tensor | None:
    """Free slots of the paged pool for the KV of drafts, for the time of this forward only.

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


def fits(runner: Any, members: Sequence[FusedItem], tokens: int) -> bool:
    """Whether every draft stays within the positions that the model knows."""
    longest = max(int(item.kv_slots.numel()) for item in members)
    return longest + tokens <= int(runner.model_config.context_len)


def look_up(first: int, item: FusedItem, mass: Tensor, tokens: int) -> list[int]:
    """A draft: the likeliest first token, and what stands behind its most attended occurrence in the chunks.

    Parameters
    ----------
    first : int
        The answer's likeliest first token over the loaded KV.
    item : FusedItem
        The request.
    mass : Tensor
        fp32 ``[kv_len]`` the question's attention, the same on every rank.
    tokens : int
        Most tokens of the draft.

    Returns
    -------
    list of int
        The first token alone where no chunk holds it.
    """
    state = item.entry.state
    prompt, near = item.prompt[: mass.numel()], _window_sums(mass.to("cpu", torch.float32))
    inside = torch.zeros(prompt.numel(), dtype=torch.bool)
    for start, end in state.request.spans or state.loads:
        inside[start:end] = True
    found = ((prompt == first) & inside).nonzero().flatten()
    if not found.numel():
        return [first]
    at = int(found[near[found].argmax()])
    following = []
    for place in range(at + 1, min(at + tokens, prompt.numel())):
        if not inside[place]:
            break
        following.append(int(prompt[place]))
    return [first, *following]


def _window_sums(mass: Tensor) -> Tensor:
    """Attention near each position: what is looked at may be a word or two away from what is copied."""
    padded = torch.nn.functional.pad(mass.double(), (_NEAR, _NEAR)).cumsum(0)
    padded = torch.nn.functional.pad(padded, (1, 0))
    return padded[2 * _NEAR : 2 * _NEAR + mass.numel()] - padded[: mass.numel()]


def rows_behind(
    members: Sequence[FusedItem], drafts: Sequence[Sequence[int]], scratch: Tensor
) -> list[RequestRows]:
    """Rows of the drafts, each behind its prompt, their KV in borrowed slots.

    Parameters
    ----------
    members : sequence of FusedItem
        Requests in their last piece.
    drafts : sequence of sequence of int
        Token ids of each draft, at least one.
    scratch : Tensor
        From :func:`borrow_slots`.
    """
    rows = []
    for item, ids, own in zip(members, drafts, scratch, strict=True):
        slots = torch.cat([item.kv_slots, own[: len(ids)].to(item.kv_slots.device)])
        rows.append(
            RequestRows(
                index=item.entry.index,
                positions=torch.arange(int(slots.numel()) - len(ids), int(slots.numel())),
                ids=torch.tensor(list(ids), dtype=torch.int64, device=slots.device),
                kv_slots=slots,
                method=item.entry.state.method,
            )
        )
    return rows
