"""What others read of a request's state; :class:`~.state.RequestState` alone changes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunk_cache import as_prompt_ids
from chunk_cache.policies import Policy
from rag_kernels import AttentionMethod
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.request.attempt import Attempt, Resolved, ReuseCost
from rag_pipeline.sglang_plugin.fusion.request.awaited import Awaited
from rag_pipeline.sglang_plugin.fusion.request.holdings import Capture, LeasedSpan
from rag_pipeline.sglang_plugin.fusion.request.memory_work import MemoryWork
from rag_pipeline.sglang_plugin.fusion.request.usage import UsageReport


class StateView(Awaited):
    """Fields of a :class:`~.state.RequestState`, with what follows from them.

    Lengths and ends are token counts from the start of
    the prompt; this is how they lie in the second turn of a conversation::

        0             prefix_len     exact_limit        turns_end                         prompt.size
        |-----------------|---------------|-----------------|-- chunk --|-- fresh --|-- question --|
        |  shared prefix  |     exact     | turns, loaded   |  loaded   |  computed |   computed   |
        |-------- radix_len ------->|- - -|
        |-------- exact_len ------------------------------->|

    ``prefix_len`` is the client's: chunks were computed behind it. ``radix_len`` is what the tree had at admission; it
    may end before ``prefix_len`` (a cold tree) or behind it. ``exact_limit`` is the first loaded token: what lies
    between the two is computed and still exact, and the tree gets nothing behind it. ``turns_end`` is 0 outside of
    conversations. ``exact_len`` is of the policy's layout (:func:`~.fused_item.plan_item`): ``turns_end``, or the end
    of the exact spans right behind ``radix_len``.

    SGLang's ``Req.full_untruncated_fill_ids`` is another prompt. Both are equal until the request is retracted. Then
    SGLang prefills the tokens that were generated before, too: its list is :attr:`prompt` and those. Chunks are
    looked for in :attr:`prompt` alone (an answer that quotes a chunk is no chunk), rows and pieces are those of
    SGLang's list, so neither can be made from the other.

    Attributes
    ----------
    request : FusionRequest
        What was asked for.
    policy : Policy
        Chooses the rows.
    prompt : ndarray
        int64 ids of ``Req.origin_input_ids``, without anything generated.
    ratio : float
        The policy's, read once.
    explicit : bool
        The client sent fusion fields, so it gets a report whatever happened.
    internal : bool
        Made by this process (background build, self-check); its output goes to no client.
    searches : bool
        Stored chunks are looked for.
    space : str
        Part of the radix namespace that holds what its attention method computed, and nothing else
        (:func:`~.namespace.method_space`); empty for the exact one.
    unit : int
        What stands there is found and published in whole units of so many tokens, counted from the first token of
        the prompt (:attr:`rag_kernels.AttentionMethod.prefix_unit`); 1 in the exact one.
    """

    __slots__ = (
        "_attempt",
        "_found",
        "_row_limit",
        "_spans",
        "explicit",
        "internal",
        "policy",
        "prompt",
        "ratio",
        "request",
        "searches",
        "space",
        "unit",
    )

    def __init__(
        self,
        request: FusionRequest,
        policy: Policy,
        prompt_ids: Any,
        *,
        explicit: bool = False,
        internal: bool = False,
        searches: bool = True,
    ) -> None:
        super().__init__()
        self.ratio = checked_ratio(policy, policy.ratio)
        self._spans: tuple[LeasedSpan, ...] = ()
        self._found = Resolved()
        self._row_limit = 0
        self.request = request
        self.policy = policy
        self.prompt: npt.NDArray[np.int64] = as_prompt_ids(np.asarray(prompt_ids, dtype=np.int64))
        self.explicit = explicit
        self.internal = internal
        self.searches = searches
        self.space = ""
        self.unit = 1
        self._attempt = Attempt(report=UsageReport(prompt_tokens=int(self.prompt.size)))

    @property
    def spans(self) -> tuple[LeasedSpan, ...]:
        """What will be loaded, rising, disjoint."""
        return self._spans

    @property
    def loads(self) -> list[tuple[int, int]]:
        """Loaded positions."""
        return [(span.start, span.end) for span in self._spans]

    @property
    def captures(self) -> tuple[Capture, ...]:
        """What will be stored after the forward."""
        return tuple(self._found.captures)

    @property
    def resolved(self) -> bool:
        """Whether matching was done in this scheduling attempt."""
        return self._found.resolved

    @property
    def done(self) -> bool:
        """Whether the whole prompt is computed."""
        return self._found.done

    @property
    def exact_limit(self) -> int | None:
        """Tokens that may be published as exact, or as the method's in its own space; None for all."""
        found = self._found
        if self.space and found.exact_limit is None and found.done and not found.decode_method:
            return found.computed_end
        return found.exact_limit

    @property
    def approximate_from(self) -> int | None:
        """First position whose KV is not what plain prefill computes, recomputed ones among it; None for none."""
        return self._found.approximate_from

    @property
    def approximations(self) -> tuple[object, ...]:
        """What of the loaded KV is approximate, and how, without anything that only this rank or process means."""
        return self._found.approximations

    @property
    def turns_end(self) -> int:
        """Where the KV of earlier turns ends; 0 without."""
        return self._found.turns_end

    @property
    def turn(self) -> int:
        """Note of the conversation memory's ``lease`` for its ``keep``."""
        return self._found.turn

    @property
    def memory(self) -> MemoryWork | None:
        """What the request does with a conversation's memory; None where it asks for none, or was given up."""
        return self._found.memory

    @property
    def loads_memory(self) -> bool:
        """Whether slots of a memory are loaded: prefilled instead, they are a sliding window, not the same at more cost."""
        return self.memory is not None and bool(self.memory.loaded)

    @property
    def radix_len(self) -> int:
        """Exact tokens found in the tree when the prompt was admitted."""
        return self._attempt.radix_len

    @property
    def epoch(self) -> int:
        """Epoch of the weights at that time."""
        return self._attempt.epoch

    @property
    def looked_up(self) -> tuple[int, int]:
        """Chunks found and chunks missing in this attempt."""
        return self._attempt.looked_up

    @property
    def cost(self) -> ReuseCost | None:
        """Seconds that what is reused takes to load and to compute; None before they were measured."""
        return self._attempt.cost

    @property
    def planned_ratio(self) -> float:
        """Share of the reused tokens that the policy plans to recompute: its ratio, or what hides behind loading."""
        planned = self._attempt.planned_ratio
        return self.ratio if planned is None else planned

    @property
    def recomputed(self) -> Sequence[int]:
        """Prompt positions that were loaded and then computed anew."""
        return self._attempt.recomputed

    @property
    def row_layers(self) -> float:
        """Work done so far: rows times layers."""
        return self._attempt.row_layers

    @property
    def report(self) -> UsageReport:
        """What the client is told."""
        return self._attempt.report

    @property
    def row_limit(self) -> int:
        """Most rows that SGLang would let the batch of its next piece have."""
        return self._row_limit

    @property
    def method(self) -> AttentionMethod | None:
        """Attention method of the computed rows; None where they read every key."""
        return self._found.method

    @property
    def decode_method(self) -> AttentionMethod | None:
        """Attention method of decoded tokens; None before the prompt is computed, and where they read every key."""
        return self._found.decode_method

    @property
    def is_fused(self) -> bool:
        """Computed by a pass of fusion's own: KV is loaded, or rows do not read every key."""
        return bool(self._spans) or self.method is not None

    @property
    def is_pending(self) -> bool:
        """Matched, with something left to load, to store or to tell the client."""
        holds = bool(self.is_fused or self._found.captures or self.explicit)
        return self.resolved and not self.done and holds


def checked_ratio(policy: Policy, ratio: float) -> float:
    """Ratio of a policy, perhaps of another distribution: budgets are raised by it."""
    ratio = float(ratio)
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"policy {policy.name!r} has ratio {ratio}; it must be between 0 and 1")
    return ratio
