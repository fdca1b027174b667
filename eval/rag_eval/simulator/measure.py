"""Hit rates by tier of every policy in every regime."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rag_eval.simulator.regimes import POLICIES, REGIMES, Regime, make_player
from rag_eval.simulator.replay import Hits, Replay
from rag_eval.simulator.traces import Trace
from rag_eval.simulator.two_tiers import TwoTiers, unbounded_hits

DISK_SPEED = 10.0
"""Reading a token's KV is so many times faster than computing it; the store's disk tier promises at least 12."""


def measure(
    trace: Trace,
    *,
    regimes: Mapping[str, Regime] = REGIMES,
    policies: Sequence[str] = POLICIES,
    ttl_s: float | None = None,
    disk_speed: float = DISK_SPEED,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Play a trace through the tiers with each policy.

    Deterministic: the same arguments give the same numbers.

    Parameters
    ----------
    trace : Trace
        Requests.
    regimes : mapping of str to Regime
        By name; the figures of the first one are the headline.
    policies : sequence of str
        Labels as in :data:`~.regimes.POLICIES`.
    ttl_s : float, optional
        Look-ahead policies then drop what was not used for so long and nobody waits for.
    disk_speed : float
        Rate of reading from disk over the server's rate of computing; positive.
    progress : callable
        Called with one line per replay.

    Returns
    -------
    dict
        JSON-ready. ``dram_hits_lookahead_vs_lru``: tokens found in memory under ``lookahead`` over those under ``lru``
        in the first regime, ``spread`` its smallest and largest value over fifths of the requests; both ``None`` where
        these policies were not asked for or LRU found nothing. ``n``: requests. ``trace``: what it is. ``regimes``: by
        name the sizes, the load, the mean queue, and by policy the shares ``memory``, ``disk``, ``hits`` (both) of the
        tokens asked for, and ``fetched``, ``demoted``, ``dropped``, ``expired`` as shares of the same. A run that is
        interrupted behind its first replay returns what it has, with ``interrupted`` true.

    Raises
    ------
    EvalError
        A label that is not known; one line.
    """
    found: dict[str, Any] = {}
    headline: dict[str, Hits] = {}
    interrupted = False
    shares: dict[str, dict[str, float]] = {}
    row: dict[str, Any] = {}
    try:
        for name, regime in regimes.items():
            row = {
                "memory_tokens": max(1, int(regime.memory * trace.distinct_tokens)),
                "disk_tokens": int(regime.disk * trace.distinct_tokens),
                "load": regime.load,
            }
            shares = {}
            for label in policies:
                begun = time.perf_counter()
                player = make_player(
                    label, trace, row["memory_tokens"], row["disk_tokens"], ttl_s=ttl_s
                )
                tiers = TwoTiers(
                    row["memory_tokens"],
                    row["disk_tokens"],
                    player.policy,
                    drops_expired=ttl_s is not None,
                )
                hits = Replay(
                    trace,
                    tiers,
                    load=regime.load,
                    prefetcher=player.prefetcher,
                    disk_speed=disk_speed,
                ).run()
                row["mean_queue"] = round(hits.waiting / len(trace.jobs), 1)  # the same for all
                shares[label] = _shares(hits, tiers)
                if not found:
                    headline[label] = hits
                progress(
                    f"{name}: {label}: memory {shares[label]['memory']:.3f}, all {shares[label]['hits']:.3f}, "
                    f"{time.perf_counter() - begun:.1f} s"
                )
            found[name] = row | {"policies": shares}
    except KeyboardInterrupt:
        interrupted = True
        if shares and name not in found:
            found[name] = row | {"policies": shares}
        if not found:
            raise
    ratio, spread = _lookahead_vs_lru(headline)
    return {
        "dram_hits_lookahead_vs_lru": ratio,
        "spread": spread,
        "n": len(trace.jobs),
        "trace": {
            "name": trace.name,
            "is_prefix": trace.is_prefix,
            "seconds": round(trace.duration_s, 1),
            "tokens": sum(job.tokens for job in trace.jobs),
            "distinct_tokens": trace.distinct_tokens,
            "unbounded_hits": round(unbounded_hits(trace), 4),
        },
        "disk_speed": disk_speed,
        "ttl_s": ttl_s,
        "regimes": found,
        "interrupted": interrupted,
    }


def _shares(hits: Hits, tiers: TwoTiers) -> dict[str, float]:
    moves = tiers.moves
    tokens = {
        "memory": hits.memory,
        "disk": hits.disk,
        "hits": hits.memory + hits.disk,
        "fetched": moves.fetched,
        "demoted": moves.demoted,
        "dropped": moves.dropped,
        "expired": moves.expired,
    }
    return {name: round(number / hits.asked, 4) for name, number in tokens.items()}


def _lookahead_vs_lru(hits: Mapping[str, Hits]) -> tuple[float | None, list[float] | None]:
    if not {"lookahead", "lru"} <= hits.keys() or not hits["lru"].memory:
        return None, None
    ahead, behind = hits["lookahead"], hits["lru"]
    parts = [a / b for a, b in zip(ahead.memory_by_part, behind.memory_by_part, strict=True) if b]
    return (
        round(ahead.memory / behind.memory, 3),
        [round(min(parts), 3), round(max(parts), 3)],
    )
