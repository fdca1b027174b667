"""Which pool slots the requests of a batch read on the CPU, found once per forward pass for all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

PADDING_ALLOWED = 1.25
"""In fast decode, requests share a call while padding adds at most a quarter to the keys read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtendSpan:
    """One request of an extend batch: its rows of the batch and its slots, oldest first.

    ``tree`` is bool ``[rows, rows]`` where the rows are drafted tokens: which of the last keys each may look at.
    """

    start: int
    stop: int
    slots: torch.Tensor | slice
    tree: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeBucket:
    """Requests of a decode batch that are served by one call."""

    rows: torch.Tensor
    slots: torch.Tensor  # [B, N]; padding repeats the request's first slot
    lengths: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotPlan:
    """Slots of one pool that a batch reads: spans of an extend batch, or buckets of a decode batch."""

    spans: list[ExtendSpan] = field(default_factory=list)
    buckets: list[DecodeBucket] = field(default_factory=list)

    @property
    def keys_read(self) -> int:
        """Keys that the tokens of a decode batch read, padding apart."""
        return sum(sum(bucket.lengths) for bucket in self.buckets)


def plan_slots(
    forward_batch: Any,
    req_to_token: torch.Tensor,
    pools: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    *,
    padding: float,
) -> list[SlotPlan]:
    """Plan a batch that is not idle.

    Parameters
    ----------
    forward_batch : object
        SGLang's batch.
    req_to_token : Tensor
        Slots by request and position, ``[requests, positions]``.
    pools : sequence of callable
        Per pool, what turns slots of the whole pool into its own.
    padding : float
        As for :func:`decode_buckets`.

    Returns
    -------
    list of SlotPlan
        One per pool.
    """
    plans = [SlotPlan() for _ in pools]
    decodes = forward_batch.forward_mode.is_decode()
    seq_lens = forward_batch.seq_lens.tolist()
    if decodes:
        for group in decode_buckets(seq_lens, padding=padding):
            lengths = [seq_lens[index] for index in group]
            rows = torch.tensor(group)
            pool_rows = forward_batch.req_pool_indices[rows]
            slots = req_to_token[pool_rows, : lengths[0]].long()
            if lengths[-1] != lengths[0]:
                # What lies behind a request's length is stale. Its own first slot is certainly
                # written, so no NaN of an unused slot can meet the mask's zero weight.
                is_padding = torch.arange(lengths[0])[None, :] >= torch.tensor(lengths)[:, None]
                slots = torch.where(is_padding, slots[:, :1], slots)
            for plan, own in zip(plans, pools, strict=True):
                plan.buckets.append(DecodeBucket(rows=rows, slots=own(slots), lengths=lengths))
        return plans
    trees: list[torch.Tensor | None] = [None] * len(seq_lens)
    if forward_batch.forward_mode.is_target_verify():
        num = int(forward_batch.spec_info.draft_token_num)
        trees = list(_trees(forward_batch.spec_info.custom_mask, seq_lens, num))
        new_lens, seq_lens = [num] * len(seq_lens), [length + num for length in seq_lens]
    else:
        new_lens = forward_batch.extend_seq_lens.tolist()
    pool_rows = forward_batch.req_pool_indices.tolist()
    start = 0
    for row, seq_len, new_len, tree in zip(pool_rows, seq_lens, new_lens, trees, strict=True):
        if new_len == 0:
            continue
        slots = req_to_token[row, :seq_len].long()
        stop = start + new_len
        for plan, own in zip(plans, pools, strict=True):
            run = _as_run(own(slots))
            plan.spans.append(ExtendSpan(start=start, stop=stop, slots=run, tree=tree))
        start = stop
    return plans


def _trees(mask: torch.Tensor, prefix_lens: Sequence[int], num: int) -> Iterator[torch.Tensor]:
    """Cut SGLang's mask of a batch: rows of ``prefix + num`` entries, ``num`` rows per request, all flattened."""
    done = 0
    for length in prefix_lens:
        size = num * (length + num)
        yield mask[done : done + size].view(num, length + num)[:, length:].bool()
        done += size


def plan_kept_slots(
    forward_batch: Any,
    req_to_token: torch.Tensor,
    kept: Sequence[torch.Tensor | None],
    *,
    padding: float,
) -> SlotPlan:
    """Plan a decode batch some of whose tokens read chosen positions; slots of the whole pool.

    Parameters
    ----------
    forward_batch : object
        SGLang's batch, in decode mode.
    req_to_token : Tensor
        As for :func:`plan_slots`.
    padding : float
        As for :func:`decode_buckets`.
    kept : sequence of Tensor or None
        Per request, int64 positions that its token reads, at least one; None for all.
    """
    rows = forward_batch.req_pool_indices.tolist()
    slots = [
        (req_to_token[row, :length] if positions is None else req_to_token[row, positions]).long()
        for row, length, positions in zip(rows, forward_batch.seq_lens.tolist(), kept, strict=True)
    ]
    plan = SlotPlan()
    for group in decode_buckets([own.numel() for own in slots], padding=padding):
        lengths = [slots[index].numel() for index in group]
        padded = torch.stack(
            [
                torch.cat([slots[index], slots[index][:1].expand(lengths[0] - length)])
                for index, length in zip(group, lengths, strict=True)
            ]
        )
        plan.buckets.append(DecodeBucket(rows=torch.tensor(group), slots=padded, lengths=lengths))
    return plan


def decode_buckets(lengths: list[int], *, padding: float = PADDING_ALLOWED) -> list[list[int]]:
    """Group requests so that one call serves each group.

    Parameters
    ----------
    lengths : list of int
        Keys of each request, at least 1.
    padding : float
        How many keys may be read for each that is needed, at least 1; 1 puts requests together only
        if they are of one length.

    Returns
    -------
    list of list of int
        Indices into ``lengths``; each appears once, the longest of a group first.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    total = 0
    for index in order:
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= padding * (total + lengths[index]):
            groups[-1].append(index)
            total += lengths[index]
        else:
            groups.append([index])
            total = lengths[index]
    return groups


def _as_run(slots: torch.Tensor) -> torch.Tensor | slice:
    """Slots that follow one another as a slice: a view of the pool instead of a copy."""
    count = slots.numel()
    first = int(slots[0])
    if int(slots[-1]) - first == count - 1 and bool((slots[1:] - slots[:-1] == 1).all()):
        return slice(first, first + count)
    return slots
