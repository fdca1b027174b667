"""Removals that survive a restart of a Valkey server: its log synced, or a snapshot made."""

from __future__ import annotations

import secrets
import time
from typing import Any

from chunk_cache.errors import ChunkCacheError

_SAVE_S = 60.0
"""Longest wait for a snapshot on the server's disk."""
_LOG_S = 5.0
"""The same where it only has to sync its log, which it does every second."""


class Durability:
    """What a server has to do before it may forget no removal.

    Parameters
    ----------
    client : valkey.Valkey
        Connected to it.
    shown : str
        Its address for messages, without secrets.
    wait_s : float
        Longest read of a socket, seconds.
    scratch : str
        Beginning of names that may be written and expire by themselves.
    errors : module
        The client's exceptions.
    """

    def __init__(
        self, client: Any, *, shown: str, wait_s: float, scratch: str, errors: Any
    ) -> None:
        self._client = client
        self._errors = errors
        self._shown = shown
        self._wait_s = wait_s
        self._scratch = scratch

    def settle(self) -> None:
        """Have all that was done so far written to the server's disk, where it keeps its data on one.

        Raises
        ------
        ChunkCacheError
            If it takes too long.
        OSError
            If it refuses.
        """
        state = self._client.info("persistence")
        if state.get("aof_enabled"):
            self._wait_for_log()
        elif self._client.config_get("save").get("save"):
            self._save(state)

    def _wait_for_log(self) -> None:
        """Have the log synced up to now."""
        until = time.monotonic() + _LOG_S
        # The server waits for what came before on the same connection, hence one connection and a write.
        with self._client.client() as connection:
            connection.set(f"{self._scratch}{secrets.token_hex(12)}", b"", ex=1)
            # In steps that are shorter than a read of the socket may last.
            while not connection.execute_command("WAITAOF", 1, 0, max(1, int(500 * self._wait_s)))[
                0
            ]:
                if time.monotonic() > until:
                    raise ChunkCacheError(
                        f"{self._shown} has not written its log to disk in {_LOG_S:g} s; "
                        "give it appendfsync everysec or always"
                    )

    def _save(self, state: dict[str, Any]) -> None:
        """Have a snapshot made that begins now."""
        until = time.monotonic() + _SAVE_S
        while True:
            while state["rdb_bgsave_in_progress"]:
                # It holds what was there when it began.
                state = self._after_a_moment(until)
            before = state["rdb_saves"]
            try:
                self._client.bgsave()
                break
            except self._errors.ResponseError as error:
                # Another client's, or the server's own, has begun since it was asked.
                if "in progress" not in str(error):
                    raise
            state = self._after_a_moment(until)
        # The count rises when a snapshot begins, and it may be put off behind a rewrite of the log.
        while state["rdb_saves"] == before or state["rdb_bgsave_in_progress"]:
            state = self._after_a_moment(until)
        if state["rdb_last_bgsave_status"] != "ok":
            raise OSError(f"{self._shown} could not save its data")

    def _after_a_moment(self, until: float) -> dict[str, Any]:
        if time.monotonic() > until:
            raise ChunkCacheError(f"{self._shown} has not saved its data in {_SAVE_S:g} s")
        time.sleep(0.02)
        state: dict[str, Any] = self._client.info("persistence")
        return state
