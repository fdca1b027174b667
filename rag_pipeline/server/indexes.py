"""Indexes as a server holds them: opened once, searched by many, replaced when a new generation appears."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.server.embedders import EmbedderPool, SharedEmbedder
from rag_pipeline.server.errors import ApiError, line_of
from retrievers import Index, Manifest, RetrievalError, SearchHit

if TYPE_CHECKING:
    from rag_pipeline.server.tenants import Tenant

logger = logging.getLogger(__name__)

FAULT_S = 10.0
"""How long a fault is believed: the files may be whole, and only descriptors or memory have run out."""

_RARELY = 10
"""Looking again takes at most one in so many seconds: a large index is read whole for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fault:
    """Why an index cannot be opened, of which manifest that was, and until when it is believed."""

    mark: tuple[int, int]
    line: str
    detail: str
    until: float


class ServedIndex:
    """One index folder, which may not exist yet.

    Parameters
    ----------
    name : str
        As requests call it.
    folder : Path
        Index folder.
    embedders : EmbedderPool
        Where the embedder comes from; the index's own, the pool's default for a new index.
    clock : callable
        Seconds, for how long a fault is believed.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        embedders: EmbedderPool,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.folder = folder
        self._embedders = embedders
        self._lock = threading.Lock()
        self._opened: Index | None = None
        self._seen: tuple[int, int] | None = None
        self._clock = clock
        self._fault: _Fault | None = None
        self._looking: threading.Thread | None = None

    @property
    def fault(self) -> str:
        """Why it cannot be opened, paths included: for the operator's terminal. Empty where it can."""
        return "" if self._fault is None else self._fault.detail

    def embedder(self) -> SharedEmbedder:
        """The embedder of the index, or the one a new index will get."""
        manifest = self.manifest()
        return self._embedders.get(None if manifest is None else manifest.embedder_name)

    def manifest(self) -> Manifest | None:
        """Manifest of the current generation; None where the folder holds no index yet."""
        return Manifest.read(self.folder) if self._mark() is not None else None

    def current(self) -> Index | None:
        """The index as it is on disk now; None where the folder holds none yet.

        A search that has begun goes on with the generation it has; its files stay open until then.

        Raises
        ------
        ApiError
            503 for an index that cannot be opened. It is looked at again when its manifest changes, and
            after some seconds.
        """
        with self._lock:
            mark = self._mark()
            if mark is None:
                self._opened = self._seen = self._fault = None
            elif self._is_believed(mark):
                raise self._unusable()
            elif mark != self._seen:
                self._open(mark)
            return self._opened

    def _is_believed(self, mark: tuple[int, int]) -> bool:
        fault = self._fault
        return fault is not None and fault.mark == mark and self._clock() < fault.until

    def _open(self, mark: tuple[int, int]) -> None:
        first = self._opened is None
        begun = self._clock()
        try:
            self._opened = Index.open(self.folder, embedder=self.embedder(), verify=first)
        except (RetrievalError, RagPipelineError, OSError) as error:
            self._opened = self._seen = None
            now = self._clock()
            self._fault = _Fault(
                mark=mark,
                line=line_of(error),
                detail=str(error),
                until=now + max(FAULT_S, _RARELY * (now - begun)),
            )
            logger.error("The index %r cannot be used: %s", self.name, error)
            raise self._unusable() from error
        self._seen, self._fault = mark, None

    def _unusable(self) -> ApiError:
        return ApiError(
            503, f"the index {self.name!r} cannot be used on this server; its log has the details"
        )

    def search(
        self, query: str, *, k: int, mode: str, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        """Return at most `k` hits, best first.

        Raises
        ------
        ApiError
            409 where there is nothing to search in yet.
        RetrievalError
            A malformed filter, or an index that cannot be read.
        """
        index = self.current()
        if index is None or len(index) == 0:
            raise ApiError(
                409,
                f"the index {self.name!r} is empty; upload documents to /v1/rag/documents first",
            )
        return index.retriever(mode).search(query, k=k, where=where)

    def documents(self, *, offset: int, limit: int) -> tuple[int, list[tuple[str, int]]]:
        """Return how many documents there are, and id and number of chunks of a page of them."""
        index = self.current()
        if index is None:
            return 0, []
        page = islice(index.documents(), offset, offset + limit)
        return index.manifest.num_documents, [(record.id, record.num_chunks) for record in page]

    def status(self) -> dict[str, Any]:
        """JSON-ready state for health; a damaged index says so instead of raising."""
        try:
            manifest, mark = self.manifest(), self._mark()
        except (RetrievalError, OSError) as error:
            return {"ok": False, "error": line_of(error)}
        fault = self._fault
        if fault is not None and fault.mark == mark:
            if not self._is_believed(mark):
                self._look_again()
            return {"ok": False, "error": fault.line}
        if manifest is None:
            return {"ok": True, "documents": 0, "chunks": 0, "embedder": self._embedders.default}
        return {
            "ok": True,
            "documents": manifest.num_documents,
            "chunks": manifest.num_chunks,
            "embedder": manifest.embedder_name,
            "factory": manifest.factory,
            "generation": manifest.generation,
        }

    def _look_again(self) -> None:
        """Open it beside the answer: whoever routes by health sends no search that would do it."""
        if self._looking is not None and self._looking.is_alive():
            return

        def look() -> None:
            with suppress(ApiError):
                self.current()

        self._looking = threading.Thread(target=look, name="rag-look-again", daemon=True)
        self._looking.start()

    def _mark(self) -> tuple[int, int] | None:
        from retrievers.manifest import MANIFEST_NAME

        try:
            found = os.stat(self.folder / MANIFEST_NAME)  # noqa: PTH116
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino


class IndexTable:
    """Every index of every tenant; a request reaches one by its tenant and a known name only."""

    def __init__(self, tenants: Sequence[Tenant], embedders: EmbedderPool) -> None:
        self._table = {
            tenant.name: {
                name: ServedIndex(name, folder, embedders)
                for name, folder in tenant.indexes.items()
            }
            for tenant in tenants
        }

    def get(self, tenant: Tenant, name: str | None) -> ServedIndex:
        """Index of a tenant by name; the tenant's first one without a name.

        Raises
        ------
        ApiError
            404, naming the indexes that this key has.
        """
        mine = self._table[tenant.name]
        if name is None:
            return next(iter(mine.values()))
        if name not in mine:
            raise ApiError(
                404, f"no index {name!r}; this key has {', '.join(mine)}", param="rag.index"
            )
        return mine[name]

    def of(self, tenant: Tenant) -> dict[str, ServedIndex]:
        """All indexes of a tenant."""
        return self._table[tenant.name]
