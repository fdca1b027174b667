"""When a prompt may be approximated: the one place of this rule.

=============================================  ==========================  ========================================
what the request wants                         fusion fields, mode `fuse`  no fusion fields
=============================================  ==========================  ========================================
new tokens                                     as it asks                  chunks only where matching is automatic,
                                                                           by the engine's default attention method
new tokens with numbers of the model's own     as it asks                  never
scores only (``/v1/score``, no new token)      never                       never
anything of a deterministic engine             never                       never
=============================================  ==========================  ========================================

Numbers of the model's own are log-probabilities, of the prompt too, hidden states and the like: who reads them
compares them, with other prompts or with another engine, and cannot see that they are near and not equal. Matching is
automatic (:attr:`.FusionConfig.automatic`) where the operator says so, for the whole engine or for a tenant. A server's
default memory keeps to the same rule (:mod:`rag_pipeline.sglang_plugin.http.chat_memory`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rag_pipeline.protocol import DENSE_ATTENTION, FusionRequest
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig

_NUMBERS = (
    "return_logprob",
    "return_hidden_states",
    "return_routed_experts",
    "return_indexer_topk",
    "return_sampling_mask",
)
"""Fields of SGLang's ``Req`` that ask for numbers beside the new tokens."""
_POOLING = ("multi_item_delimiter_indices", "token_indices_to_pool")
"""Fields of SGLang's ``Req`` that only scoring sets."""


def refuse_engine(server_args: Any) -> str | None:
    """Reason why an engine with these settings approximates nothing, or None.

    Parameters
    ----------
    server_args : sglang.srt.server_args.ServerArgs
        Settings of the engine.
    """
    for name in ("enable_deterministic_inference", "rl_on_policy_target"):
        if getattr(server_args, name, None):
            flag = f"--{name.replace('_', '-')}"
            return (
                f"deterministic inference ({flag}): what is in the cache would change the answers"
            )
    return None


def refuse_asked(request: FusionRequest, req: Any) -> str | None:
    """Reason, as a label for the counters, why a request is not approximated although it asks; None if it may be.

    Parameters
    ----------
    request : FusionRequest
        Its fusion fields.
    req : Req
        SGLang's.
    """
    return "scoring" if request.mode == "fuse" and _only_scores(req) else None


class Unasked(NamedTuple):
    """What a request gets that has no fusion fields."""

    matching: bool
    """Whether stored chunks may be looked for in its prompt."""
    attention: bool
    """Whether the engine's default attention method serves it."""


def may_unasked(config: FusionConfig, req: Any) -> Unasked:
    """What a request may get that has no fusion fields.

    Parameters
    ----------
    config : FusionConfig
        The operator's switches.
    req : Req
        SGLang's.
    """
    if _only_scores(req) or any(getattr(req, name) for name in _NUMBERS):
        return Unasked(matching=False, attention=False)
    tenant = (req.cache_salt or "").partition("/")[0]
    return Unasked(
        matching=config.automatic or tenant in config.automatic_tenants,
        attention=config.attention != DENSE_ATTENTION,
    )


def _only_scores(req: Any) -> bool:
    pools = any(getattr(req, name) is not None for name in _POOLING)
    return pools or req.sampling_params.max_new_tokens == 0
