"""What fusion knows of one request while it lives in the scheduler: every field has one writer, and it is here or in :mod:`.awaited`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
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

ATTRIBUTE = "rag_fusion"
"""Name under which the state hangs on SGLang's ``Req``."""


class RequestState(Awaited):
    """State of one request; lives on ``Req`` as :data:`ATTRIBUTE`.

    Others read its fields and change them by its methods alone. Lengths and ends are token counts from the start of
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
        "__weakref__",
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
        self.ratio = _checked(policy, policy.ratio)
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

    # -- what others read ---------------------------------------------------------------------

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

    # -- admission ----------------------------------------------------------------------------

    def enter(self, space: str, unit: int) -> None:
        """Note :attr:`space` and :attr:`unit`."""
        self.space, self.unit = space, unit

    def begin_attempt(self, radix_len: int, epoch: int) -> None:
        """Let go of all that an earlier attempt held, found or spent."""
        self.drop()
        report = UsageReport(prompt_tokens=int(self.prompt.size))
        self._attempt = Attempt(report=report, radix_len=radix_len, epoch=epoch)

    def lease(self, spans: Iterable[LeasedSpan]) -> None:
        """Take over leases, each behind those that are held."""
        self._spans = (*self._spans, *spans)

    def retain(self, spans: Iterable[LeasedSpan]) -> None:
        """Hold these spans, cut ones among them, and release every other lease."""
        kept = tuple(spans)
        leases = {id(span.lease) for span in kept}
        for span in self._spans:
            if id(span.lease) not in leases:
                span.lease.release()
        self._spans = kept

    def set_turns(self, spans: Iterable[LeasedSpan], *, end: int, turn: int) -> None:
        """Hold what earlier turns left, ``is_turn`` each, and no other span; see :attr:`turns_end`, :attr:`turn`."""
        held = tuple(spans)
        self.retain(held)
        at = self.radix_len
        for span in held:
            if span.start < at or span.end > end or not span.is_turn:
                raise ValueError(
                    f"turns at {[(s.start, s.end) for s in held]} up to {end}: they must rise, not overlap, lie "
                    f"behind the {self.radix_len} tokens of the tree, and be marked as turns"
                )
            at = span.end
        self._found.turns_end, self._found.turn = end, turn

    def begin_memory(self, work: MemoryWork) -> None:
        """Note :attr:`memory`."""
        self._found.memory = work

    def note_looked_up(self, hits: int, misses: int) -> None:
        """Note how many chunks were found and how many are missing."""
        self._attempt.looked_up = (hits, misses)

    def note_cost(self, cost: ReuseCost | None) -> None:
        """Note :attr:`cost`."""
        self._attempt.cost = cost

    def note_planned(self, ratio: float) -> None:
        """Note :attr:`planned_ratio`."""
        self._attempt.planned_ratio = _checked(self.policy, ratio)

    def note_fallback(self, reason: str) -> None:
        """Note why the prompt, or a part of it, is prefilled as usual; the first reason stays."""
        self.report.fallback = self.report.fallback or reason

    def begin_capture(self, capture: Capture) -> None:
        """Store a chunk after the forward."""
        self._found.captures.append(capture)

    def resolve(self) -> None:
        """End matching: from here on the first loaded token limits what is exact."""
        self._found.resolved = True
        if self._spans:
            self._found.exact_limit = min(span.start for span in self._spans)
        # A chunk in its own place is exact as it is loaded, but a policy may shift or recompute it.
        approximate = [span for span in self._spans if not (span.is_turn and span.is_exact)]
        if approximate:
            self._found.approximate_from = min(span.start for span in approximate)
            self._found.approximations = tuple(
                (s.start, s.end, s.delta, s.is_behind_passage, s.is_turn, s.lease.record.codec)
                for s in approximate
            )

    def attend_by(self, method: AttentionMethod | None) -> None:
        """Let a method say which keys the rows read: they are approximate from the first one on.

        In the method's own space all are what that space holds, up to the first loaded one.
        """
        self._found.method = method
        if self.space:
            starts = [span.start for span in self._spans]
            self._found.exact_limit = 0 if method is None else min(starts, default=None)
            self._found.approximate_from = 0
        elif method is not None:
            self._found.exact_limit = self.radix_len
            self._found.approximate_from = self.radix_len

    def give_up(self, reason: str) -> None:
        """Prefill as usual from here on, and say why."""
        self.drop()
        self._found.resolved = True
        self._claim_nothing()
        self.note_fallback(reason)

    def _claim_nothing(self) -> None:
        """Publish nothing that is computed from here on in a method's space: its rows read every key."""
        if self.space:
            self._found.exact_limit = 0

    def limit_rows(self, rows: int) -> None:
        """Note :attr:`row_limit`."""
        self._row_limit = rows

    # -- the forward --------------------------------------------------------------------------

    def begin_piece(self, start: int) -> None:
        """Publish no more in a method's space where a piece begins within a unit of the method: its rows choose apart."""
        if self.space and start % self.unit:
            limit, before = start - start % self.unit, self._found.exact_limit
            self._found.exact_limit = limit if before is None else min(limit, before)

    def charge(self, rows: int, layers: float) -> None:
        """Count rows that were computed through so many layers; the one place where work is summed."""
        self._attempt.row_layers += layers * rows

    def note_recomputed(self, positions: Collection[int]) -> None:
        """Note loaded positions that are computed anew."""
        self.report.recomputed_tokens += len(positions)
        self._attempt.recomputed.extend(positions)

    def end_capture(self, capture: Capture, *, stored: bool) -> None:
        """Note that the build of a capture has ended."""
        self._found.captures.remove(capture)
        self.report.built_chunks += stored

    def forget_spans(self, reason: str) -> None:
        """Load nothing any more, read every key, and say why; what may be published as exact stays as it is."""
        self.retain(())
        if self._found.memory is not None:
            self._found.memory.lose_load()
        self._found.method = None
        self._claim_nothing()
        self._attempt.row_layers = 0.0
        self._attempt.recomputed = []
        self.report.recomputed_tokens = 0
        self.note_fallback(reason)

    def decode_densely(self) -> None:
        """Let decoded tokens read every key from here on."""
        self._found.decode_method = None

    def finish(self, end: int, *, decodes_alone: bool = True) -> None:
        """End the leases of a computed prompt; the limit of what may be published stays.

        A method that acts on decoding goes on there. What it decodes is published in its own space, too, unless
        some of it is decoded in batches with prompts, where every key is read.

        Parameters
        ----------
        end : int
            Tokens that were prefilled.
        decodes_alone : bool
            Decoded tokens come in batches of their own.
        """
        if self.space and not decodes_alone and self._found.exact_limit is None:
            self._found.exact_limit = end
        self._found.computed_end = end
        self.retain(())
        self.drop_captures()
        if self.method is not None and self.method.acts_on_decode:
            self._found.decode_method = self.method
        self._found.method = None
        self._found.done = True

    # -- letting go ---------------------------------------------------------------------------

    def drop(self) -> None:
        """Give leases and build rights back; a new scheduling attempt starts over."""
        self.retain(())
        self.drop_captures()
        self._found = Resolved()

    def drop_captures(self) -> None:
        """Give build rights back: nothing is stored any more."""
        for capture in self._found.captures:
            capture.build.abort("request ended before its chunk was complete", failed=False)
        self._found.captures = []

    def __del__(self) -> None:
        # A request that is dropped from a queue is never released by the scheduler: it holds nothing.
        self.drop()


def state_of(req: Any) -> RequestState | None:
    """Return the state that hangs on a request, or None."""
    found = getattr(req, ATTRIBUTE, None)
    return found if isinstance(found, RequestState) else None


def _checked(policy: Policy, ratio: float) -> float:
    """Ratio of a policy, perhaps of another distribution: budgets are raised by it."""
    ratio = float(ratio)
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"policy {policy.name!r} has ratio {ratio}; it must be between 0 and 1")
    return ratio
