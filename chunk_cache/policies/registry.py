"""From a name, or ``name:ratio``, to a policy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from chunk_cache.policies.base import Policy
from rag_kernels import Registry
from rag_kernels.options import make_config

POLICIES: Registry[type[Policy]] = Registry(
    "policy",
    "rag_pipeline.policies",
    {
        "full": "chunk_cache.policies.full:FullPolicy",
        "reuse": "chunk_cache.policies.reuse:ReusePolicy",
        "cacheblend": "chunk_cache.policies.cacheblend:CacheBlendPolicy",
        "epic": "chunk_cache.policies.epic:EpicPolicy",
        "query": "chunk_cache.policies.query:QueryPolicy",
        "adaptive": "chunk_cache.policies.adaptive:AdaptivePolicy",
    },
    base=Policy,
    reserved=("prefix",),  # ordinary prefill, where a client names a policy
)
"""Policies by name. A client names one in its request; each process that reads it must know it."""

DEFAULT_POLICY = "query"
"""The most faithful at equal work on the models measured."""


def policy_names() -> tuple[str, ...]:
    """Names that :func:`create_policy` knows."""
    return POLICIES.names()


def create_policy(name: str, ratio: float | None = None, **options: Any) -> Policy:
    """Make a policy.

    Parameters
    ----------
    name : str
        ``full``, ``reuse``, ``cacheblend``, ``epic``, ``query`` or ``adaptive``, or ``NAME:RATIO``
        (``cacheblend:0.15``).
    ratio : float, optional
        Share of the reused tokens' full computation, 0 to 1; the policy's own default when not given.
    **options : object
        Fields of the policy's config.

    Raises
    ------
    ValueError
        An unknown name or option, a wrong type or value; one line that says what is allowed.
    """
    if not isinstance(name, str):
        raise ValueError(f"policy is {name!r}; give a name: {', '.join(policy_names())}.")
    base, colon, tail = name.partition(":")
    policy_type = POLICIES.get(base)
    if colon:
        if ratio is not None:
            raise ValueError(
                f"policy {name!r} names a ratio and ratio={ratio} is given too; give one of them."
            )
        try:
            ratio = float(tail)
        except ValueError:
            raise ValueError(
                f"policy {name!r}: {tail!r} is not a ratio; write {base}:0.15."
            ) from None
    given = dict(options)
    if ratio is not None:
        if all(field.name != "ratio" for field in fields(policy_type.config_type)):
            raise ValueError(f"policy {base!r} takes no ratio; leave it out.")
        given["ratio"] = ratio
    return policy_type(make_config(f"policy {base!r}", policy_type.config_type, given))
