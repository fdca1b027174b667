"""What fusion knows of one request while it lives in the scheduler, and what it reports in the end."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chunk_cache import Build, Lease, Match, as_prompt_ids, tenant_mark
from chunk_cache.policies import Policy
from rag_kernels import AttentionMethod
from rag_pipeline.protocol import FusionRequest

ATTRIBUTE = "rag_fusion"
"""Name under which the state hangs on SGLang's ``Req``."""


class Tenant(NamedTuple):
    """What separates requests in the radix tree, and so separates chunks too."""

    extra_key: str | None
    cache_salt: str | None

    @property
    def salt(self) -> str:
        """Part of the identity of chunk KV; empty for requests without either."""
        if self.extra_key is None and self.cache_salt is None:
            return ""
        return repr((self.extra_key or "", self.cache_salt or ""))

    @property
    def share(self) -> str:
        """To whom its chunks belong: whose share of the stores and queues they take, and whose deletions reach them.

        The same before and after they were on a disk. A tenant of a server may split its salt by a ``/`` as often
        as it likes, and is one.
        """
        salt = self.cache_salt or self.extra_key or ""
        return tenant_mark(salt.partition("/")[0] or salt)


@dataclasses.dataclass(kw_only=True, slots=True)
class UsageReport:
    """Tokens of one prompt by what happened to them; they add up to ``prompt_tokens``.

    Attributes
    ----------
    exact_prefix_tokens : int
        Found in the radix tree: exact KV.
    reused_tokens : int
        KV loaded and kept, that of earlier turns included.
    recomputed_tokens : int
        KV loaded, then computed anew by the policy.
    fresh_tokens : int
        Computed, never loaded.
    computed_fraction : float
        Row-layers really computed, scoring passes included, over those of prefilling all behind the prefix.
    policy : str
        Policy that chose the rows; empty for ordinary prefill.
    ratio : float
        Its nominal ratio.
    conversation_tokens : int
        Of the reused tokens, those that earlier turns of the conversation left.
    fallback : str
        Why the prompt, or a part of it, was prefilled as usual; empty if it was not.
    runs : list of [int, int]
        The same token by token: lengths of the prompt's runs in order, ``[kind, tokens]`` with kind 0 exact
        prefix, 1 reused, 2 recomputed, 3 fresh. Empty where nothing was loaded.
    attention : str
        Method that said which keys the computed rows read; not in the report where they read all.
    """

    prompt_tokens: int = 0
    exact_prefix_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    fresh_tokens: int = 0
    computed_fraction: float = 1.0
    policy: str = ""
    ratio: float = 0.0
    fallback: str = ""
    built_chunks: int = 0
    conversation_tokens: int = 0
    runs: list[list[int]] = dataclasses.field(default_factory=list)
    attention: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dict."""
        fields = dataclasses.asdict(self)
        if not self.attention:
            del fields["attention"]
        return fields


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Capture:
    """A chunk whose KV this request computes exactly: prompt positions ``[start, end)``."""

    start: int
    end: int
    base_position: int
    build: Build


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LeasedSpan:
    """A run of a stored chunk at prompt positions ``[start, end)``, with the lease that holds it.

    ``is_turn`` marks a run that an earlier turn of the conversation left: no policy recomputes it.
    ``is_behind_passage`` marks KV that saw the neutral passage.
    ``is_exact`` marks KV that plain prefill of the prompt would compute too, behind exact KV.
    """

    match: Match
    lease: Lease
    is_turn: bool = False
    is_behind_passage: bool = False
    is_exact: bool = False

    @property
    def start(self) -> int:
        """First prompt position."""
        return self.match.prompt_start

    @property
    def end(self) -> int:
        """One past the last prompt position."""
        return self.match.prompt_end

    @property
    def delta(self) -> int:
        """New position minus the position that the KV was computed at."""
        return self.start - (self.lease.record.base_position + self.match.chunk_offset)


class RequestState:
    """Mutable state of one request; lives on ``Req`` as :data:`ATTRIBUTE`.

    Attributes
    ----------
    request : FusionRequest
        What was asked for.
    policy : Policy
        Chooses the rows.
    resolved, done : bool
        Matching was done in this scheduling attempt and spans are leased; the whole prompt is computed.
    spans : list of LeasedSpan
        What will be loaded, rising, disjoint.
    method : AttentionMethod or None
        Says which keys the computed rows read; None for all.
    captures : list of Capture
        What will be stored after the forward.
    radix_len : int
        Exact tokens found in the tree when the prompt was admitted.
    epoch : int
        Of the weights at that time.
    looked_up : (int, int)
        Chunks found and chunks missing in this attempt.
    exact_limit : int or None
        Tokens that may be published as exact; None for all.
    turns_end : int
        Where the KV of earlier turns ends; 0 without.
    turn : int
        Number of the segment that ends there.
    recomputed : list of int
        Prompt positions that were loaded and then computed anew.
    row_layers : float
        Work done so far: rows times layers.
    row_limit : int
        Most rows that SGLang would let the batch of its next piece have.
    explicit : bool
        The client sent fusion fields, so it gets a report whatever happened.
    internal : bool
        Made by this process (background build, self-check); its output goes to no client.
    """

    __slots__ = (
        "__weakref__",
        "captures",
        "done",
        "epoch",
        "exact_limit",
        "explicit",
        "internal",
        "looked_up",
        "method",
        "policy",
        "prompt",
        "radix_len",
        "recomputed",
        "report",
        "request",
        "resolved",
        "row_layers",
        "row_limit",
        "spans",
        "turn",
        "turns_end",
    )

    def __init__(
        self,
        request: FusionRequest,
        policy: Policy,
        prompt_ids: Any,
        *,
        explicit: bool = False,
        internal: bool = False,
    ) -> None:
        self.request = request
        self.policy = policy
        self.prompt: npt.NDArray[np.int64] = as_prompt_ids(np.asarray(prompt_ids, dtype=np.int64))
        self.resolved = False
        self.done = False
        self.spans: list[LeasedSpan] = []
        self.method: AttentionMethod | None = None
        self.captures: list[Capture] = []
        self.radix_len = 0
        self.epoch = 0
        self.looked_up = (0, 0)
        self.recomputed: list[int] = []
        self.exact_limit: int | None = None
        self.turns_end = 0
        self.turn = 0
        self.row_layers = 0.0
        self.row_limit = 0
        self.explicit = explicit
        self.internal = internal
        self.report = UsageReport(prompt_tokens=int(self.prompt.size))

    @property
    def loads(self) -> list[tuple[int, int]]:
        """Loaded positions."""
        return [(span.start, span.end) for span in self.spans]

    def drop(self) -> None:
        """Give leases and build rights back; a new scheduling attempt starts over."""
        for span in self.spans:
            span.lease.release()
        self.spans = []
        self.method = None
        self.drop_captures()
        self.resolved = False
        self.done = False
        self.exact_limit = None
        self.turns_end = self.turn = 0

    def attend_by(self, method: AttentionMethod | None) -> None:
        """Let a method say which keys the rows read: they are approximate from the first one on."""
        self.method = method
        if method is not None:
            self.exact_limit = self.radix_len

    def drop_captures(self) -> None:
        """Give build rights back: nothing is stored any more."""
        for capture in self.captures:
            capture.build.abort("request ended before its chunk was complete", failed=False)
        self.captures = []

    def forget_spans(self, reason: str) -> None:
        """Load nothing any more, read every key, and say why; what may be published stays as it is."""
        for span in self.spans:
            span.lease.release()
        self.spans = []
        self.method = None
        self.row_layers = 0.0
        self.report.recomputed_tokens = 0
        self.recomputed = []
        self.report.fallback = self.report.fallback or reason

    def finish(self) -> None:
        """End the leases of a computed prompt; the limit of what may be published stays."""
        for span in self.spans:
            span.lease.release()
        self.spans = []
        self.method = None
        self.drop_captures()
        self.done = True

    def __del__(self) -> None:
        # A request that is dropped from a queue is never released by the scheduler: it holds nothing.
        self.drop()

    @property
    def is_pending(self) -> bool:
        """Matched, with something left to load, to store or to tell the client."""
        return (
            self.resolved and not self.done and bool(self.spans or self.captures or self.explicit)
        )

    @property
    def is_fused(self) -> bool:
        """Computed by a pass of fusion's own: KV is loaded, or rows do not read every key."""
        return bool(self.spans) or self.method is not None

    def give_up(self, reason: str) -> None:
        """Prefill as usual from here on, and say why."""
        self.drop()
        self.resolved = True
        self.report.fallback = self.report.fallback or reason


def state_of(req: Any) -> RequestState | None:
    """Return the state that hangs on a request, or None."""
    found = getattr(req, ATTRIBUTE, None)
    return found if isinstance(found, RequestState) else None
