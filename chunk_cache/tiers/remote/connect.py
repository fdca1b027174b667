"""From an address to a remote tier behind a circuit breaker."""

from __future__ import annotations

import contextlib
from typing import Any

from chunk_cache.tiers.base import Tier
from chunk_cache.tiers.guard import GuardedTier
from chunk_cache.tiers.remote.notices import GuardedBoard
from chunk_cache.tiers.remote.url import VALKEY_SCHEMES, parse_remote_url
from rag_kernels import Registry

REMOTE_TIERS: Registry[type[Tier]] = Registry(
    "remote tier",
    "rag_pipeline.remote_tiers",
    dict.fromkeys(VALKEY_SCHEMES, "chunk_cache.tiers.remote.valkey:ValkeyTier")
    # By name only: what it adapts is an engine's, which nothing here imports.
    | {"hicache": "rag_pipeline.sglang_plugin.hicache.tier:HiCacheTier"},
    base=Tier,
)
"""Remote tiers by the scheme of their address (before a ``+``); ``connect`` takes the whole address."""


def connect_remote(url: str, *, byte_budget: int, model: str, codec: str = "plain") -> GuardedTier:
    """Open the remote tier at an address; it need not answer yet.

    It is asked once whether it answers, for a second or so, so that a fault is told in the log at the start of an
    engine and the first request does not wait for it.

    Parameters
    ----------
    url : str
        The operator's ``fusion.remote``.
    byte_budget : int
        Most bytes of one record.
    model : str
        Folder of the model whose records are written.
    codec : str
        Codec of what is written.

    Raises
    ------
    ChunkCacheError
        One line: the address is none, or what it needs is not installed. Never because nobody answers.
    """
    parsed = parse_remote_url(url)
    tier: Any = REMOTE_TIERS.get(parsed.kind).connect(url, byte_budget=byte_budget, model=model)
    tier.codec = codec
    # A look-up waits a little longer than one read of a socket, whose own words say more.
    guarded = GuardedTier(tier, name=parsed.shown, wait_s=1.2 * getattr(tier, "wait_s", 1.0))
    if hasattr(tier, "check"):
        with contextlib.suppress(OSError):
            guarded.demand(tier.check)
    return guarded


def check_remote(url: str) -> None:
    """Check that an engine on this machine can use an address; no server is asked, for one that is down may come back.

    Raises
    ------
    ChunkCacheError
        One line: the address is none, or what it needs is not installed.
    """
    REMOTE_TIERS.get(parse_remote_url(url).kind).check_usable(url)


def connect_board(url: str) -> GuardedBoard | None:
    """Open the board of notices of the store at an address; ``None`` where stores of its kind have none.

    Those whose tier has a class method ``connect_board`` (of the address, to a
    :class:`~chunk_cache.tiers.remote.notices.NoticeBoard`) have one. The store need not answer yet.

    Raises
    ------
    ChunkCacheError, OSError
        The address is none, what it needs is not installed, or a folder cannot be made.
    """
    parsed = parse_remote_url(url)
    connect = getattr(REMOTE_TIERS.get(parsed.kind), "connect_board", None)
    return None if connect is None else GuardedBoard(connect(url), name=parsed.shown)
