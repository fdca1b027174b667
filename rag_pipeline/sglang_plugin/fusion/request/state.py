"""What fusion knows of one request while it lives in the scheduler: every field has one writer, and it is here or in :mod:`.awaited`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from rag_kernels import AttentionMethod
from rag_pipeline.sglang_plugin.fusion.request.attempt import Attempt, Resolved, ReuseCost
from rag_pipeline.sglang_plugin.fusion.request.holdings import Capture, LeasedSpan
from rag_pipeline.sglang_plugin.fusion.request.memory_work import MemoryWork
from rag_pipeline.sglang_plugin.fusion.request.state_view import StateView, checked_ratio
from rag_pipeline.sglang_plugin.fusion.request.usage import UsageReport

ATTRIBUTE = "rag_fusion"
"""Name under which the state hangs on SGLang's ``Req``."""


class RequestState(StateView):
    """State of one request; lives on ``Req`` as :data:`ATTRIBUTE`.

    Others read its fields, which :class:`StateView` describes, and change them by its methods alone.
    """

    __slots__ = ("__weakref__",)

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
        self._attempt.planned_ratio = checked_ratio(self.policy, ratio)

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
