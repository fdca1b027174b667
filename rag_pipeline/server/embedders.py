"""Embedding models that all indexes of a server share: loaded once, for questions first."""

from __future__ import annotations

import functools
import gc
import importlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rag_pipeline.server.priority import give_way
from rag_pipeline.server.turns import Turns
from retrievers import Embedder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BATCH = 16
_BATCH_CHARS = 4096
"""Texts of one forward pass, and characters when each is padded to the longest.

A thousand tokens or so: enough rows to keep two cores busy, and a long query does not make those
of others as wide. A single text may be longer. Eight short queries take twice the time of one.
"""

T = TypeVar("T")


class _Behind:
    """A thread that gives way to the others, where threads have a priority of their own.

    It is no executor's: one of those takes no more work once the interpreter ends, and an ingest
    that is told to stop needs its last vectors to come to the place where it stops.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_started = False
        self._lock = threading.Lock()

    def run(self, function: Callable[[], T]) -> T:
        """Run a function there and wait for it.

        Raises
        ------
        RuntimeError
            Where the system has no thread for it; the next call tries again.
        """
        with self._lock:
            if not self._is_started:
                threading.Thread(target=self._work, name="rag-embed", daemon=True).start()
                self._is_started = True
        done: Future[T] = Future()

        def job() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self._jobs.put(job)
        return done.result()

    def _work(self) -> None:
        give_way()
        while True:
            self._jobs.get()()


@dataclass(frozen=True, slots=True, eq=False)
class _Query:
    """Texts that wait for a pass, and what comes of it."""

    texts: Sequence[str]
    vectors: Future[NDArray[np.float32]] = field(default_factory=Future)


class SharedEmbedder(Embedder):
    """An embedder that several threads use.

    Queries that wait at the same time go through the model together: a vector then differs from
    that of the query alone by rounding, as in any padded batch. Passages go through it beside
    them, in a thread that gives way.
    """

    def __init__(self, model: str | Path, *, name: str) -> None:
        super().__init__(model, name=name)
        self._asking = Turns()
        self._ingesting = Turns()
        self._behind = _Behind()
        self._loading = threading.RLock()
        # A tokenizer keeps the settings of its last call: two calls at once spoil each other.
        self._tokenizing = threading.RLock()
        self._queries: deque[_Query] = deque()

    @property
    def fingerprint(self) -> str:
        """Hex digest over weights, configuration, tokenizer, prompts and normalisation."""
        with self._loading:
            return super().fingerprint

    def _loaded(self) -> Any:
        # Sizes and fingerprints are asked for outside the turn; the model is loaded once all the same.
        with self._loading:
            return super()._loaded()

    def _load(self) -> Any:
        model = super()._load()
        tokenize = model.preprocess

        def one_at_a_time(*args: Any, **options: Any) -> Any:
            with self._tokenizing:
                return tokenize(*args, **options)

        model.preprocess = one_at_a_time
        return model

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of several queries, ``(len(texts), dim)`` float32, unit length."""
        mine = _Query(texts)
        self._queries.append(mine)
        with self._asking.turn():
            # Whoever had a turn before may have taken this query along.
            while not mine.vectors.done():
                self._encode_waiting()
        return mine.vectors.result()

    def _encode_waiting(self) -> None:
        """Encode what waits, in one pass; only who has the turn may."""
        taken = [self._queries.popleft()]
        count, longest = len(taken[0].texts), _longest(taken[0].texts)
        while self._queries:
            texts = self._queries[0].texts
            count, longest = count + len(texts), max(longest, _longest(texts))
            if count > _BATCH or count * longest > _BATCH_CHARS:
                break
            taken.append(self._queries.popleft())
        try:
            self._encode(taken)
        except Exception as error:
            if len(taken) == 1:
                taken[0].vectors.set_exception(error)
                return
            # One of them has what the model cannot read; the others are not to suffer from it.
            for query in taken:
                try:
                    self._encode([query])
                except Exception as own:
                    query.vectors.set_exception(own)

    def _encode(self, queries: Sequence[_Query]) -> None:
        vectors = super().encode_queries([text for query in queries for text in query.texts])
        start = 0
        for query in queries:
            end = start + len(query.texts)
            query.vectors.set_result(vectors[start:end])
            start = end

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Vectors of passages, ``(len(texts), dim)`` float32, unit length, in the order given."""
        import numpy as np

        out = np.empty((len(texts), self.dim), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        start = 0
        while start < len(by_length):
            # Padded to the first of them, which is the longest.
            fit = _BATCH_CHARS // max(1, len(texts[by_length[start]]))
            rows = by_length[start : start + min(_BATCH, max(1, fit))]
            start += len(rows)
            # Whoever watches may stop it while it waits.
            with self._ingesting.turn(None if progress is None else functools.partial(progress, 0)):
                batch = [texts[row] for row in rows]
                encode = super().encode_documents
                out[rows] = self._behind.run(functools.partial(encode, batch))
            if progress is not None:
                progress(len(rows))
        return out

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text in the model's own tokenizer, without truncation or prompt."""
        counts: list[int] = []
        for start in range(0, len(texts), _BATCH):
            with self._tokenizing:
                counts += super().count_tokens(texts[start : start + _BATCH])
        return counts


def _longest(texts: Sequence[str]) -> int:
    return max(map(len, texts), default=0)


class EmbedderPool:
    """One embedder a name, however many indexes were built with it."""

    def __init__(self, default: str) -> None:
        self.default = default
        self._made: dict[str, SharedEmbedder] = {}
        self._lock = threading.Lock()

    def get(self, name: str | None = None) -> SharedEmbedder:
        """Embedder by name, folder or hub id; the default one without a name."""
        from rag_pipeline.models import resolve_embedder

        wanted = name or self.default
        with self._lock:
            if wanted not in self._made:
                self._made[wanted] = SharedEmbedder(resolve_embedder(wanted).path, name=wanted)
            return self._made[wanted]

    def warm(self) -> None:
        """Load the default embedder and what searches import, so that no question waits for it."""
        # Several texts: the tokenizer's threads then have the priority of this thread, not that of an upload.
        self.get().encode_queries(["warm", "up"])
        # It takes a second of the interpreter, and an index that is still empty has not imported it yet.
        importlib.import_module("bm25s")
        # A million objects of libraries and models stay for good. A collection that goes through them all, set off
        # by an upload's many small ones, holds up everybody for 0.4 s.
        gc.collect()
        gc.freeze()
