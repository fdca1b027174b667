"""Notices of erasure in a Valkey server.

::

    ragkv:2:e:names    stream: the names of the notices, in the order of the server's clock
    ragkv:2:e:bodies   hash: what each of them says

Two keys, so that a look costs one short round trip however much the notices say. Neither expires as a key: a server
with a ``volatile-*`` policy never evicts them, one with ``allkeys-lru`` or ``-lfu`` last, since every server of the
store looks at them every few seconds. Where it evicts what a notice says, its name says that there was one.
"""

from __future__ import annotations

import time
from typing import Any

from chunk_cache.tiers.remote.notices import KEEP_S, NoticeBoard, Posted
from chunk_cache.tiers.remote.valkey_client import PREFIX, ValkeyServer

NAMES = f"{PREFIX}e:names"
BODIES = f"{PREFIX}e:bodies"
_BATCH = 256
"""Notices per round trip."""


class ValkeyNotices(NoticeBoard):
    """The board of one server.

    Parameters
    ----------
    server : ValkeyServer
        Where it is.
    """

    def __init__(self, server: ValkeyServer) -> None:
        self._server = server
        self._last = ""
        """Place of the newest that was read."""

    def post(self, name: str, body: bytes) -> None:
        """Add a notice, and drop those that are too old."""
        client = self._server.client
        with self._server.answers():
            try:
                client.hset(BODIES, name, body)
            except self._server.errors.OutOfMemoryError as error:
                raise OSError(f"{self._server.url.shown}: {error}") from None
            # Read by its name, so that comes last.
            place = client.xadd(NAMES, {"name": name})
            # By the server's clock, which every server of the store shares. Where it was ahead once, places stay ahead
            # for ever, and what is new would count as old.
            now = min(int(place.partition(b"-")[0]), round(1000 * time.time()))
            oldest = max(0, now - round(1000 * KEEP_S))
            old = client.xrange(NAMES, "-", f"({oldest}-0", count=_BATCH)
            if old:
                client.xdel(NAMES, *(one for one, _ in old))
                # Several servers, and ranks of one, post the same notice: the last of its names takes the body along.
                kept = {fields.get(b"name") for _, fields in client.xrange(NAMES, f"{oldest}-0")}
                # One without a name is nobody's of ours.
                gone = {fields.get(b"name", place) for place, fields in old} - kept
                if gone:
                    client.hdel(BODIES, *gone)

    def new(self) -> list[Posted]:
        """Read those behind the newest that was read."""
        client, last = self._server.client, self._last
        found: list[Posted] = []
        with self._server.answers():
            while True:
                pipeline = client.pipeline(transaction=False)
                pipeline.xrevrange(NAMES, count=1)
                pipeline.xrange(NAMES, f"({last}" if last else "-", "+", count=_BATCH)
                pipeline.touch(BODIES)
                newest, rows, _ = pipeline.execute()
                if newest and last and _number(newest[0][0]) < _number(last.encode()):
                    # A server that lost its data and whose clock went back begins anew.
                    last = ""
                    continue
                found += self._bodies(rows)
                last = rows[-1][0].decode() if rows else last
                if len(rows) < _BATCH:
                    # Only now: what raised halfway is read once more.
                    self._last = last
                    return found

    def _bodies(self, rows: list[tuple[bytes, dict[bytes, Any]]]) -> list[Posted]:
        return [
            Posted(
                fields.get(b"name", place).decode("ascii", "replace"),
                self._server.client.hget(BODIES, fields.get(b"name", b"")),
            )
            for place, fields in rows
        ]


def _number(place: bytes) -> tuple[int, int]:
    milliseconds, _, within = place.partition(b"-")
    return int(milliseconds), int(within or 0)
