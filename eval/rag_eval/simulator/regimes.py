"""What is compared: sizes of the tiers, loads, and policies by their labels."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable
from typing import Any, NamedTuple

from chunk_cache.eviction import DEFAULT_TTL_S, EVICTIONS, EvictionPolicy, LookAheadPolicy
from rag_eval.errors import EvalError
from rag_eval.simulator.traces import Trace

POLICIES = (
    "lru", "lfu", "fifo", "lru+prefetch", "lookahead", "lookahead-prefetch", "lookahead:lfu",
    "lookahead:fifo-birth", "lookahead:ttl", "belady",
)  # fmt: skip
"""Labels: a policy, ``:`` and a variant, and ``+prefetch`` or ``-prefetch`` where it differs from the policy's habit."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """Sizes and load.

    Attributes
    ----------
    memory, disk : float
        Budgets as shares of the trace's distinct tokens; the first positive, the second not negative.
    load : float
        Offered work over the server's rate; positive.
    """

    memory: float
    disk: float
    load: float

    def __post_init__(self) -> None:
        if not (0 < self.memory < float("inf") and 0 <= self.disk < float("inf")) or not (
            0 < self.load < float("inf")
        ):
            raise EvalError(
                f"regime: memory={self.memory}, disk={self.disk}, load={self.load}; memory and load must be positive, "
                "disk not negative"
            )


REGIMES = {
    "loaded": Regime(memory=0.05, disk=0.5, load=1.2),
    "loaded, memory x4": Regime(memory=0.2, disk=0.5, load=1.2),
    "loaded, small disk": Regime(memory=0.05, disk=0.05, load=1.2),
    "loaded, no disk": Regime(memory=0.05, disk=0.0, load=1.2),
    "busy": Regime(memory=0.05, disk=0.5, load=0.9),
    "light": Regime(memory=0.05, disk=0.5, load=0.4),
    "light, small disk": Regime(memory=0.05, disk=0.05, load=0.4),
}
"""By name. The light ones and those with a small disk are where looking ahead has little to go by."""


class Player(NamedTuple):
    """What one label makes for a replay."""

    policy: EvictionPolicy
    prefetcher: LookAheadPolicy | None


def make_player(
    label: str, trace: Trace, memory_tokens: int, disk_tokens: int, *, ttl_s: float | None = None
) -> Player:
    """Make the policy of a label, and what fetches ahead for it.

    A policy that does not look at the queue is given the same prefetch window when its label says ``+prefetch``, so
    that what fetching brings and what eviction brings can be told apart. The oracle fetches ahead like the look-ahead.

    Parameters
    ----------
    label : str
        As in :data:`POLICIES`.
    trace : Trace
        What the oracle knows.
    memory_tokens, disk_tokens : int
        Budgets.
    ttl_s : float, optional
        TTL of the look-ahead policies.

    Raises
    ------
    EvalError
        A label that is not known; one line.
    """
    name, fetches = label, None
    for ending, wanted in (("+prefetch", True), ("-prefetch", False)):
        if label.endswith(ending):
            name, fetches = label.removesuffix(ending), wanted
    name, _, variant = name.partition(":")
    budgets: dict[str, Any] = {"memory_bytes": memory_tokens, "disk_bytes": disk_tokens}
    ttl = DEFAULT_TTL_S if ttl_s is None else ttl_s
    try:
        kind = EVICTIONS.get(name)
        if issubclass(kind, LookAheadPolicy):
            policy: EvictionPolicy = kind(**budgets, variant=variant, ttl_s=ttl)
        elif kind.needs_future:
            policy = kind(**budgets, variant=variant, future=_future(trace))  # type: ignore[call-arg]
        else:
            policy = kind(**budgets, variant=variant)
    except ValueError as error:
        raise EvalError(str(error).rstrip(".")) from None
    if fetches is False or (fetches is None and not (kind.uses_queue or kind.needs_future)):
        return Player(policy, None)
    if isinstance(policy, LookAheadPolicy):
        return Player(policy, policy)
    return Player(policy, LookAheadPolicy(**budgets))


def _future(trace: Trace) -> dict[Hashable, list[int]]:
    future: dict[Hashable, list[int]] = defaultdict(list)
    for number, job in enumerate(trace.jobs):
        for key in job.keys:
            future[key].append(number)
    return future
