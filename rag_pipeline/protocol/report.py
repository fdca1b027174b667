"""What the engine reports on a request: why it ended, and what happened to the tokens of its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rag_pipeline.protocol.messages import Usage

FUSION_KEY = "rag_fusion"
"""Key of fusion's report in ``meta_info``, and of its state in the engine's internal state."""
METRIC_PREFIX = f"{FUSION_KEY}:"
"""Beginning of the name of each of fusion's metrics at ``/metrics``."""


def fusion_report(meta_info: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what fusion reports on a request, or ``None`` where it left the request alone.

    In a stream the first message carries it as an object, and later ones as a list of one or empty.
    """
    report = meta_info.get(FUSION_KEY)
    if isinstance(report, list) and report:
        report = report[0]
    return report if isinstance(report, Mapping) else None


def usage_from_meta(meta_info: Mapping[str, Any], *, prompt_tokens: int) -> Usage:
    """Count a prompt's tokens by what happened to them; the one place that reads the engine's report.

    Parameters
    ----------
    meta_info : mapping
        ``meta_info`` of the last piece; may be empty when the stream broke.
    prompt_tokens : int
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


def finish_reason(meta_info: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Kind of the end (``stop``, ``length``, ``abort``) and the engine's message, if any."""
    reason = meta_info.get("finish_reason")
    if isinstance(reason, Mapping):
        message = reason.get("message")
        return str(reason.get("type")), None if message is None else str(message)
    return (None if reason is None else str(reason)), None
