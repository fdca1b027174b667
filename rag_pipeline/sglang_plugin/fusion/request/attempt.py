"""What a scheduling attempt found, spent and holds; :class:`~.state.RequestState` alone changes it."""

from __future__ import annotations

import dataclasses

from rag_kernels import AttentionMethod
from rag_pipeline.sglang_plugin.fusion.request.holdings import Capture
from rag_pipeline.sglang_plugin.fusion.request.memory_work import MemoryWork
from rag_pipeline.sglang_plugin.fusion.request.usage import UsageReport


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReuseCost:
    """What the reused tokens of a request cost, the same on every rank.

    Attributes
    ----------
    row_s : float
        Seconds to compute a row.
    load_s : float
        Seconds to load all that is loaded, earlier turns apart.
    """

    row_s: float
    load_s: float


@dataclasses.dataclass(kw_only=True, slots=True)
class Attempt:
    """What a scheduling attempt found and spent; each attempt begins with a new one.

    Attributes
    ----------
    radix_len : int
        Exact tokens found in the tree when the prompt was admitted.
    epoch : int
        Of the weights at that time.
    looked_up : (int, int)
        Chunks found and chunks missing.
    cost : ReuseCost or None
        Of what is reused; None before it was measured.
    planned_ratio : float or None
        What the policy plans to recompute of it; None for its nominal ratio.
    recomputed : list of int
        Prompt positions that were loaded and then computed anew.
    row_layers : float
        Work done so far: rows times layers.
    report : UsageReport
        What the client is told. :func:`~.report.fill_report` completes it.
    """

    report: UsageReport
    radix_len: int = 0
    epoch: int = 0
    looked_up: tuple[int, int] = (0, 0)
    cost: ReuseCost | None = None
    planned_ratio: float | None = None
    recomputed: list[int] = dataclasses.field(default_factory=list)
    row_layers: float = 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Resolved:
    """What was found for a prompt, for as long as its leases are held.

    Attributes
    ----------
    resolved, done : bool
        Matching was done in this scheduling attempt and spans are leased; the whole prompt is computed.
    captures : list of Capture
        What will be stored after the forward.
    exact_limit : int or None
        Tokens that may be published as exact; None for all.
    approximate_from : int or None
        First position whose KV is not what plain prefill computes; None for none.
    approximations : tuple
        What is approximate in what is loaded, the same on every rank; empty for nothing.
    turns_end : int
        Where the KV of earlier turns ends; 0 without.
    turn : int
        What the conversation memory notes for its ``keep``: of :class:`~.turns.TurnMemory` the number of the fused
        turn that ends there, 0 for none, negative where a cut has moved it.
    method : AttentionMethod or None
        Says which keys the computed rows read; None for all.
    decode_method : AttentionMethod or None
        Says which keys decoded tokens read, once the prompt is computed; None for all.
    computed_end : int
        Tokens that were prefilled, once all are.
    memory : MemoryWork or None
        What the request does with a conversation's memory.
    """

    resolved: bool = False
    done: bool = False
    captures: list[Capture] = dataclasses.field(default_factory=list)
    exact_limit: int | None = None
    approximate_from: int | None = None
    approximations: tuple[object, ...] = ()
    turns_end: int = 0
    turn: int = 0
    method: AttentionMethod | None = None
    decode_method: AttentionMethod | None = None
    computed_end: int = 0
    memory: MemoryWork | None = None
