"""A folder of chunk KV behind a line of a given bandwidth, for engines that a benchmark starts."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chunk_cache import TIERS, ChunkKey, LayerReader, StoreFolder
from chunk_cache.keys import TokenIds
from rag_eval.slow_reader import SlowReader
from rag_pipeline.whole_file import write_whole

NAME = "throttled"
_OFFER = f"[rag_pipeline.tiers]\n{NAME} = {__name__}:ThrottledFolder\n"


class Line:
    """A line that one transfer occupies at a time; thread-safe."""

    def __init__(self) -> None:
        self._free_at = 0.0
        self._lock = threading.Lock()

    def transfer(self, num_bytes: float, bytes_per_s: float) -> None:
        """Wait until so many bytes have gone through, behind those that were begun before."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + num_bytes / bytes_per_s
            ends = self._free_at
        time.sleep(max(0.0, ends - time.perf_counter()))


class ThrottledFolder(StoreFolder):
    """The tier ``disk`` whose layers come through a :class:`Line`; headers come at once.

    How fast the line is stands in a file beside the folder (:func:`set_bytes_per_s`), which is read whenever a record
    is opened: the benchmark learns how fast the engine computes only when it runs.
    """

    _line = Line()

    def open(  # type: ignore[override]  # a reader of less than a folder's own has
        self, key: ChunkKey, token_ids: TokenIds
    ) -> LayerReader | None:
        """Open a record; each of its layers takes its time."""
        record = super().open(key, token_ids)
        try:
            bytes_per_s = float(_speed_file(self.path).read_text("ascii"))
        except FileNotFoundError:
            return record
        if record is None:
            return None
        layer_bytes = self.size_of(key) / record.num_layers
        return SlowReader(record, lambda index: self._line.transfer(layer_bytes, bytes_per_s))


def set_bytes_per_s(folder: Path, bytes_per_s: float) -> None:
    """Throttle a folder's line, bytes of the files per second."""
    write_whole(_speed_file(folder), repr(bytes_per_s))


def _speed_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.bytes_per_s")


@contextmanager
def throttled_tier() -> Iterator[str]:
    """Have this process, and the engines that it starts meanwhile, know the tier; gives its name.

    It is offered as another distribution would offer it: engines are processes of their own, which get this one's
    search path.
    """
    with tempfile.TemporaryDirectory(prefix="rag-eval-tier-") as site:
        info = Path(site) / "rag_eval_throttled-1.dist-info"
        info.mkdir()
        write_whole(
            info / "METADATA", "Metadata-Version: 2.1\nName: rag-eval-throttled\nVersion: 1\n"
        )
        write_whole(info / "entry_points.txt", _OFFER)
        sys.path.append(site)
        if NAME not in TIERS.names():  # asked for offers before this one was there
            TIERS.register(NAME, ThrottledFolder)
        try:
            yield NAME
        finally:
            TIERS.unregister(NAME)
            sys.path.remove(site)
