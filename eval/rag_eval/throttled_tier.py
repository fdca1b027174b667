"""A folder of chunk KV behind a line of a given bandwidth, for engines that a benchmark starts."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chunk_cache import TIERS, ChunkKey, LayerReader, StoreFolder, TokenIds
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
    """The tier ``disk`` whose layers come through a :class:`Line`; headers, and layers that came ahead, come at once.

    How fast the line is, and how many layers came ahead, stands in a file beside the folder (:func:`throttle`), which is
    read whenever a record is opened: a benchmark learns how fast the engine computes only when it runs.
    """

    _line = Line()

    def open(  # type: ignore[override]  # a reader of less than a folder's own has
        self, key: ChunkKey, token_ids: TokenIds
    ) -> LayerReader | None:
        """Open a record; each of its layers takes its time."""
        record = super().open(key, token_ids)
        try:
            bytes_per_s, ahead = json.loads(_settings_file(self.path).read_bytes())
        except FileNotFoundError:
            return record
        if record is None:
            return None
        layer_bytes = self.size_of(key) / record.num_layers

        def before(index: int) -> None:
            if index >= ahead:
                self._line.transfer(layer_bytes, bytes_per_s)

        return SlowReader(record, before)


def throttle(folder: Path, bytes_per_s: float, ahead: int = 0) -> None:
    """Throttle a folder's line.

    Parameters
    ----------
    folder : Path
        Of the tier.
    bytes_per_s : float
        Bytes of the files per second.
    ahead : int
        Layers of each record that do not go through the line.
    """
    write_whole(_settings_file(folder), json.dumps([bytes_per_s, ahead]))


def _settings_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.throttle.json")


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
        TIERS.names()  # reads the offers, once per process: this one must not stay
        TIERS.register(NAME, ThrottledFolder)
        sys.path.append(site)
        try:
            yield NAME
        finally:
            TIERS.unregister(NAME)
            sys.path.remove(site)
