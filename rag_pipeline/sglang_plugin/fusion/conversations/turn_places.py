"""What of a finished turn is kept, and digests of all that its KV depends on besides tokens and model."""

from __future__ import annotations

import dataclasses
import hashlib

from chunk_cache import hash_token_ids
from rag_pipeline.sglang_plugin.fusion.conversations.lineage import EXACT
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.attention_methods import method_for_weights
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


def namespace_of(runtime: FusionRuntime, state: RequestState, tenant: RadixNamespace) -> str:
    """Digest of everything but tokens and model that a turn's KV depends on."""
    passage = state.request.passage is not False
    own = (tenant.salt, state.request.conversation, state.policy.identity, passage)
    method = method_for_weights(runtime, state.request)  # with what it was calibrated to
    told = repr(own if method is None else (*own, method.identity))
    return hashlib.blake2b(told.encode(), digest_size=32, person=b"ragkv-turns").hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TurnPlace:
    """A part of a finished turn that is to be kept, and what it was computed behind.

    Attributes
    ----------
    start, end : int
        First position, and one past the last.
    parent : int
        Number of the stored turn in front of it; 0 for none.
    through : str
        As of :class:`~.lineage.Lineage`.
    is_alone : bool
        The conversation goes on from this turn only: all others of it are let go of.
    """

    start: int
    end: int
    parent: int = 0
    through: str = EXACT
    is_alone: bool = False


def through_of(runtime: FusionRuntime, state: RequestState) -> str:
    """Digest of the approximations that a finished request went through; never that of none."""
    told = repr(
        (
            state.approximations,
            state.approximate_from,
            state.report.runs,
            state.planned_ratio,
            hash_token_ids(runtime.passage),
        )
    )
    return hashlib.blake2b(told.encode(), digest_size=32, person=b"ragkv-fused").hexdigest()
