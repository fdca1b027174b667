"""Text that was deleted goes from this engine's chunk KV: the memory store, what waits for the disk, the folder.

Whoever deletes a document posts a notice (:mod:`rag_pipeline.erasure`). A thread looks for them every few seconds
and goes through the records by their text. A notice stays in force for a few minutes: a request that found the text
before it was deleted may compute its chunk only then.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from chunk_cache import ChunkKey, ChunkKV
from rag_pipeline.erasure import NOTICE_S, Decode, Notice, decoder_of, erase_folder, notices

if TYPE_CHECKING:
    from rag_pipeline.sglang_plugin.fusion.runtime import FusionRuntime

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""How often notices are looked for, seconds."""


class ErasedText:
    """What was erased lately, for one engine.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    model : str
        Folder of the tokenizer.
    """

    def __init__(self, runtime: FusionRuntime, model: str) -> None:
        self._runtime = runtime
        self._model = model
        self._decode: Decode | None = None
        self._seen: set[str] = set()
        self._in_force: list[tuple[float, Notice]] = []
        self._checked: set[ChunkKey] = set()

    def watch(self) -> None:
        """Look for notices from now on, in a thread."""
        threading.Thread(target=self._run, name="chunk-kv-erasure", daemon=True).start()

    def is_in(self, record: ChunkKV) -> bool:
        """Whether a record holds text that is erased."""
        notices_now = self._in_force
        if not notices_now:
            return False
        text = self._text(record)
        return any(text is None or notice.marks.are_in(text) for _, notice in notices_now)

    def look(self) -> int:
        """Take in new notices, and erase; returns how many records went from memory."""
        now = time.monotonic()
        new = list(notices(self._seen))
        held = [(until, notice) for until, notice in self._in_force if until > now]
        self._in_force = held + [(now + NOTICE_S, notice) for notice in new]
        if new:
            self._checked.clear()
        if not self._in_force:
            return 0
        gone = self._from_memory()
        for notice in new:
            self._from_folder(notice)
            self._runtime.forget_passage(notice.marks)
        return gone

    def _from_memory(self) -> int:
        """Erase what is in the store, except what was looked at since the last notice."""
        store, writer = self._runtime.store, self._runtime.writer
        gone = []
        for key in store.keys():  # noqa: SIM118 - a list, not a mapping
            if key in self._checked:
                continue
            self._checked.add(key)
            with store.borrow(key) as record:
                if record is not None and self.is_in(record):
                    gone.append(key)
        store.erase(gone)
        if writer is not None:
            for key in gone:
                writer.folder.remove(key)
        self._runtime.metrics.count("disk", "erased_in_memory", len(gone))
        return len(gone)

    def _from_folder(self, notice: Notice) -> None:
        """Erase from this engine's folder, where whoever deleted did not know it."""
        path = self._runtime.config.store_dir
        if path and str(Path(path).absolute()) not in notice.folders:
            erase_folder(Path(path), notice.marks)

    def _text(self, record: ChunkKV) -> str | None:
        if self._decode is None:
            self._decode = decoder_of(Path(self._model))
        return self._decode(record.token_ids) if self._decode is not None else None

    def _run(self) -> None:
        while True:
            try:
                self.look()
            except Exception as error:
                # The thread goes on: the next look may succeed, and nothing else erases.
                self._runtime.say_once("erased", "Erased text may still be in chunk KV: %s", error)
                self._checked.clear()
            time.sleep(LOOK_S)
