"""What a backend promises, and what both kinds share: request fields and usage."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any, Protocol

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.types import GenerationPiece, GenerationRequest, Usage

FUSION_KEY = "rag_fusion"
"""Key of the plugin's report in ``meta_info``."""

PREFIX_POLICY = "prefix"
"""Ordinary prefill behind the radix tree: fusion leaves the request alone."""


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
        ``kv_hints``; for policy ``prefix`` they say that fusion leaves this request alone. An
        engine without the plugin ignores them.

    Raises
    ------
    RagPipelineError
        Unknown policy, or a ratio that the policy does not take.
    """
    from rag_pipeline.sglang_plugin import FusionRequest

    spans = tuple((span.start, span.end) for span in request.spans)
    prefix_len = spans[0][0] if spans else 0
    if request.build:
        fusion = FusionRequest(
            mode="build", spans=spans, prefix_len=prefix_len, passage=request.passage or None
        )
    elif request.policy == PREFIX_POLICY:
        if request.ratio is not None:
            raise RagPipelineError(
                f"policy {PREFIX_POLICY!r} takes no ratio, {request.ratio} was given; leave it out"
            )
        fusion = FusionRequest(mode="off")
    else:
        fusion = FusionRequest(
            spans=spans, prefix_len=prefix_len, policy=request.policy, ratio=request.ratio
        )
        _check_policy(fusion)
    return {"kv_hints": fusion.to_kv_hints()}


def _check_policy(fusion: Any) -> None:
    """Refuse an unknown policy here, naming ``prefix`` among the allowed ones."""
    from chunk_cache.policies import policy_names

    if fusion.policy.partition(":")[0] not in policy_names():
        allowed = ", ".join((PREFIX_POLICY, *policy_names()))
        raise RagPipelineError(f"policy {fusion.policy!r} is unknown; allowed are {allowed}")
    fusion.make_policy(fusion.policy)


def fusion_report(meta_info: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the plugin reports on a request, or ``None`` where the fusion left it alone.

    In a stream the first message carries it as an object, and later ones as a list of one or empty.
    """
    report = meta_info.get(FUSION_KEY)
    if isinstance(report, list) and report:
        report = report[0]
    return report if isinstance(report, Mapping) else None


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
    report = fusion_report(meta_info)
    if report is not None:
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
