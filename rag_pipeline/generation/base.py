"""What a backend promises, and what both kinds share: request fields and usage."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any, Protocol

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.types import GenerationPiece, GenerationRequest, Usage

FUSION_KEY = "rag_fusion"
"""Key of the plugin's report in ``meta_info``."""

POLICIES = ("prefix",)
"""Policies a request may name; the fusion extends them."""


class Backend(Protocol):
    """Generates text from token ids. Safe to use from several threads and tasks at once."""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    def generate(self, request: GenerationRequest) -> Generator[GenerationPiece, None, None]:
        """Yield pieces as they come; closing the generator aborts the request in the engine."""
        ...

    def agenerate(self, request: GenerationRequest) -> AsyncGenerator[GenerationPiece, None]:
        """Yield as :meth:`generate` does, without blocking the event loop."""
        ...

    def close(self) -> None:
        """Release what the backend itself started; a second call does nothing."""
        ...


def extra_fields(request: GenerationRequest) -> dict[str, Any]:
    """Fields of a ``/generate`` request that carry policy and spans to the fusion.

    Parameters
    ----------
    request
        The request.

    Returns
    -------
    dict
        Empty for ordinary prefill.

    Raises
    ------
    RagPipelineError
        Unknown policy, or a ratio where there is nothing to recompute.
    """
    if request.policy not in POLICIES:
        raise RagPipelineError(
            f"policy {request.policy!r} is unknown; allowed are {', '.join(POLICIES)}"
        )
    if request.ratio is not None:
        raise RagPipelineError(
            f"policy {request.policy!r} takes no ratio, {request.ratio} was given; leave it out"
        )
    return {}


def usage_from_meta(meta_info: Mapping[str, Any], *, prompt_tokens: int) -> Usage:
    """Token counts of a request from the engine's report; the one place that reads it.

    Parameters
    ----------
    meta_info
        ``meta_info`` of the last piece; may be empty when the stream broke.
    prompt_tokens
        Tokens that were sent.

    Returns
    -------
    Usage
        With ``exact + reused + recomputed + fresh == prompt_tokens``.
    """
    exact = min(int(meta_info.get("cached_tokens") or 0), prompt_tokens)
    reused = recomputed = 0
    report = meta_info.get(FUSION_KEY)
    if isinstance(report, Mapping):  # absent for requests that the fusion left alone
        exact = int(report["exact_prefix_tokens"])
        reused, recomputed = int(report["reused_tokens"]), int(report["recomputed_tokens"])
    return Usage(
        prompt_tokens=prompt_tokens,
        exact_prefix_tokens=exact,
        reused_tokens=reused,
        recomputed_tokens=recomputed,
        fresh_tokens=prompt_tokens - exact - reused - recomputed,
        completion_tokens=int(meta_info.get("completion_tokens") or 0),
    )


def delta(text: str, seen: int, *, incremental: bool, final: bool) -> tuple[str, int]:
    """Text that is new in a streamed piece.

    SGLang sends the text so far with every piece, or only what is new, depending on how it was
    started. A trailing replacement character is half of a multi-byte character whose rest comes
    with the next piece, so it is held back.

    Returns
    -------
    tuple
        The new text, and the number of characters handed out so far.
    """
    if incremental:
        return text, seen + len(text)
    whole = text[:-1] if text.endswith("\ufffd") and not final else text
    return whole[seen:], max(seen, len(whole))


def finish_reason(meta_info: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Kind of the end (``stop``, ``length``, ``abort``) and the engine's message, if any."""
    reason = meta_info.get("finish_reason")
    if isinstance(reason, Mapping):
        message = reason.get("message")
        return str(reason.get("type")), None if message is None else str(message)
    return (None if reason is None else str(reason)), None
