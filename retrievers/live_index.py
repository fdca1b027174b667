"""An index folder as it is now: opened once, opened anew when another generation appears."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from retrievers.errors import RetrievalError
from retrievers.index_store import MODES, Index
from retrievers.manifest import MANIFEST_NAME
from retrievers.types import SearchHit

if TYPE_CHECKING:
    from retrievers.text_embedder import TextEmbedder


class LiveIndex:
    """One index folder, which may not exist yet, followed through its generations.

    Every look at it costs one ``stat``. Threads may share it: a search that has begun goes on with
    the generation that it has, whose files stay open until then.

    Parameters
    ----------
    folder : str or Path
        Index folder.
    embedder : TextEmbedder, optional
        Model of the index; None for BM25 alone.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        embedder: TextEmbedder | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._embedder = embedder
        self._lock = threading.Lock()
        self._opened: Index | None = None
        self._seen: tuple[int, int, int] | None = None

    def current(self) -> Index | None:
        """The index as it is on disk now; None where the folder holds none.

        Raises
        ------
        EmbedderMismatchError
            Where the folder holds an index of another model.
        CorruptIndexError
            For missing, cut off or altered files.
        """
        with self._lock:
            # NOTE: taken before the index is opened: what is written meanwhile is seen next time.
            mark = self._mark()
            if mark is None:
                self._opened = self._seen = None
            elif mark != self._seen:
                # NOTE: the old state is not closed: a search in another thread may still read it.
                self._opened = self._open(verify=self._opened is None)
                self._seen = mark
            return self._opened

    def check(self) -> None:
        """Open the folder anew and compare every file with its checksum."""
        with self._lock:
            mark = self._mark()
            self._opened = None if mark is None else self._open(verify=True)
            self._seen = mark

    def retriever(self, mode: str = "hybrid") -> LiveRetriever:
        """Make a retriever that searches the current generation; modes as for an index.

        Raises
        ------
        RetrievalError
            An unknown mode, or a folder without an index.
        """
        retriever = LiveRetriever(self, mode)
        retriever.index().retriever(mode)
        return retriever

    def _open(self, *, verify: bool) -> Index:
        return Index.open(self.folder, embedder=self._embedder, verify=verify)

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self.folder / MANIFEST_NAME)  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size


class LiveRetriever:
    """Ranks the chunks of whatever generation is current when it is asked."""

    def __init__(self, live: LiveIndex, mode: str) -> None:
        if mode not in MODES:
            raise RetrievalError(f"retrieval mode {mode!r} is not one of {', '.join(MODES)}")
        self._live = live
        self._mode = mode

    def index(self) -> Index:
        """The index that the next search reads; refused where the folder has lost it."""
        index = self._live.current()
        if index is None:
            raise RetrievalError(
                f"{self._live.folder} holds no index ({MANIFEST_NAME} is missing); "
                "build one with `rag-pipeline ingest`"
            )
        return index

    def search(
        self, query: str, *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        """Return at most `k` hits, best first."""
        return self.index().retriever(self._mode).search(query, k=k, where=where)
