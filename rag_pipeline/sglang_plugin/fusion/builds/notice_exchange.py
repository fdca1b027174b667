"""Notices of erasure between the engines of several machines, by way of the store that they share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import rag_pipeline.erasure as erasure
from chunk_cache import NoticeBoard, connect_board, shown_url, write_private
from rag_pipeline.notices import Notice
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig

logger = logging.getLogger(__name__)


class NoticeExchange:
    """One engine's part in it.

    A notice stays in the store for weeks, and a server reads all of them at its start: what it kept in a folder while it
    was off is erased then. So that no start does it again, the names of what was gone through lie in a file.

    Parameters
    ----------
    board : NoticeBoard
        Of the store.
    done_file : Path
        Where the names are kept; one file for each pair of folder and store.
    """

    def __init__(self, board: NoticeBoard, done_file: Path) -> None:
        self._board = board
        self._done_file = done_file
        self._done = _names_in(done_file)
        self._on_board: set[str] = set()
        self._waiting: dict[str, Notice] = {}

    def read(self) -> list[Notice]:
        """Notices of other machines that this engine has not gone through, those of its own among them.

        Raises
        ------
        OSError
            Where the store does not answer.
        """
        posted = self._board.new()
        self._on_board.update(one.name for one in posted)
        return [
            Notice.from_bytes(one.name, one.body) for one in posted if one.name not in self._done
        ]

    def pass_on(self, notices: Iterable[Notice]) -> None:
        """Post notices of this machine, and those that could not be posted before.

        Raises
        ------
        OSError
            Where the store does not answer; the next call posts them.
        """
        self._waiting |= {notice.name: notice for notice in notices}
        try:
            for name, notice in list(self._waiting.items()):
                if name not in self._on_board:
                    self._board.post(name, notice.to_bytes())
                    self._on_board.add(name)
                # The thread that watches may have posted it meanwhile.
                self._waiting.pop(name, None)
        except OSError:
            # An engine that is started anew has to find them.
            for name in list(self._waiting):
                erasure.keep(name)
            raise

    def done(self, notices: Iterable[Notice]) -> None:
        """Note that notices were gone through in everything that outlives this engine."""
        done = self._done | {notice.name for notice in notices}
        # Ranks and engines with the same folder share the file; what the store has dropped is dropped here.
        self._done = (done | _names_in(self._done_file)) & self._on_board
        with contextlib.suppress(OSError):  # then the next start does it again
            write_private(self._done_file, json.dumps(sorted(self._done)).encode())


def open_exchange(config: FusionConfig) -> NoticeExchange | None:
    """The exchange of an engine; ``None`` without a store that several servers share, or where it has no board."""
    if not config.remote:
        return None
    try:
        board = connect_board(config.remote)
    except Exception as error:  # a tier of another distribution may raise anything
        logger.error("Notices of erasure are not exchanged: %s", error)
        return None
    shown = shown_url(config.remote)
    if board is None:
        logger.warning(
            "%s keeps no notices: what is erased here goes from that store, but other servers keep their own copies, and "
            "may write them back; erase there too",
            shown,
        )
        return None
    if board.limits:
        logger.warning("%s: %s", shown, board.limits)
    place = json.dumps([config.tier, str(Path(config.store_dir).absolute()), shown])
    digest = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
    return NoticeExchange(board, erasure.board() / f"done-{digest}")


def _names_in(file: Path) -> set[str]:
    try:
        return set(map(str, json.loads(file.read_bytes())))
    except (OSError, ValueError, TypeError):
        return set()
