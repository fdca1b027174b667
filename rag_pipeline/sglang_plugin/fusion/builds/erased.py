"""Text that was deleted goes from this engine's chunk KV: the memory store, what waits for the disk, the folder.

Whoever deletes a document posts a notice (:mod:`rag_pipeline.erasure`). A thread looks for notices every few seconds,
and goes through the records by their text. Where several servers share a store, notices of other machines come by way
of it (:mod:`.notice_exchange`). A notice stays in force for a few minutes: a request that found the text before it was
deleted may compute its chunk only then.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from chunk_cache import Candidate, ChunkKey, ChunkKV
from rag_pipeline.erasure import (
    NOTICE_S,
    Decode,
    decoder_of,
    sweep,
    sweep_folder,
)
from rag_pipeline.notices import combined
from rag_pipeline.sglang_plugin.fusion.builds.notices_in_force import NoticesInForce

if TYPE_CHECKING:
    from rag_pipeline.notices import Notice
    from rag_pipeline.sglang_plugin.fusion.builds.notice_exchange import NoticeExchange
    from rag_pipeline.sglang_plugin.fusion.runtime.build_queue import MissingChunk
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

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
    exchange : NoticeExchange, optional
        With other machines.
    """

    def __init__(
        self, runtime: FusionRuntime, model: str, exchange: NoticeExchange | None = None
    ) -> None:
        self._runtime = runtime
        self._model = model
        self.notices = NoticesInForce(exchange, deaf=self._deaf)
        self._combined: tuple[list[tuple[float, Notice]], list[Notice]] = ([], [])
        """What is in force, and the same in few notices."""
        self._decode: Decode | None = None
        self._checked: set[ChunkKey] = set()
        """Chunks without erased text, as far as the notices until now say."""
        self._files: set[ChunkKey] = set()
        """What is gone from memory, and perhaps not yet from the disk."""
        self._unsynced = False
        """Whether a removal may not survive a power cut yet."""
        self._unforgotten: set[ChunkKey] = set()
        """What is gone from memory, and perhaps not yet from what conversations remember."""
        self._remembered = False
        """Whether conversations may remember tokens that a notice is about."""
        self._travels = False
        """Whether text that a notice is about may be on its way to a tier, or from one."""
        self._condemned: dict[ChunkKey, float] = {}
        """Chunks of erased text that were waiting to be built, and until when one may come of it."""
        self._written: dict[ChunkKey, tuple[npt.NDArray[Any], str]] = {}
        """What was written to a tier since notices were looked for last, and whose: memory may have lost it since."""
        self._noting = threading.Lock()
        """Taken to note what is written: between two looks nothing may get lost."""

    def begin(self) -> None:
        """Take in the notices that there are, and erase from memory what an engine has read at its start."""
        try:
            if self._take_in():
                self._from_memory()
        except Exception as error:
            self._say(error)

    def watch(self) -> None:
        """Look for notices from now on, in a thread."""
        threading.Thread(target=self._run, name="chunk-kv-erasure", daemon=True).start()

    def is_in(self, record: ChunkKV | Candidate, tenant: str) -> bool:
        """Whether a record, in memory or to be fetched, of a tenant (:func:`chunk_cache.tenant_mark`) holds erased text."""
        if record.key in self._condemned:
            return True
        # Of a record that is still below memory its own tokens are known, until its header is there.
        seen = record.seen_ids if isinstance(record, ChunkKV) else record.token_ids
        return self._is_erased(seen, tenant)

    def is_in_written(self, record: ChunkKV, tenant: str) -> bool:
        """As :meth:`is_in`, for a record that is just being written to a tier.

        It may have been written behind somebody who deletes and went through the folder already, before this engine
        has seen the notice; so it is looked at once more then. Notices of other machines are read for each: one of them
        may be going through the store that they share, and this record would be written behind it.
        """
        if self.notices.exchange is not None:
            self.notices.hear()
        with self._noting:
            self._written[record.key] = record.seen_ids, tenant
        return self.is_in(record, tenant)

    def look(self) -> int:
        """Take in new notices, and erase; returns how many records went from memory.

        What fails is done again by the next look. A tier that fails keeps nothing in the others.

        Raises
        ------
        OSError, ChunkCacheError
            The first thing that failed.
        """
        now = time.monotonic()
        # Before notices are looked for: what is written from now on is asked about with them in force.
        with self._noting:
            written, self._written = self._written, {}
        try:
            self._take_in()
            told = self.notices.pass_on()
            self._condemn(now)
            self._files.update(self._written_meanwhile(written))
        except Exception:
            with self._noting:
                self._written = written | self._written  # the next look asks again
            raise
        held_on = self.notices.in_force or self._condemned or self._unforgotten
        gone = self._from_memory() if held_on else 0
        # One tier may be down for hours: what the others hold goes meanwhile.
        refused = [*told, *self._from_tiers(), *self._finish_notices()]
        refused += self._from_conversations()
        if refused:
            raise refused[0]
        return gone

    def _take_in(self) -> bool:
        """Take in new notices, and forget what is on its way and erased; whether there are any."""
        tiers, fetcher = self._runtime.tiers, self._runtime.fetcher
        is_new = bool(self.notices.take())
        if is_new:
            # Notices are told once: what is left to do for them is noted before anything can fail.
            self._checked.clear()
            self._remembered = self._travels = True
        if self._travels:
            if tiers is not None:
                tiers.erase()
            if fetcher is not None:
                fetcher.erase()
            self._travels = False
        return is_new

    def _deaf(self, error: Exception) -> None:
        self._runtime.say_once(
            "notices", "Notices of erasure of other servers cannot be read: %s", error
        )

    def _written_meanwhile(
        self, written: dict[ChunkKey, tuple[npt.NDArray[Any], str]]
    ) -> list[ChunkKey]:
        """Erased ones among records that were written since the last look."""
        if not (self.notices.in_force or self._condemned):
            return []
        return [
            key
            for key, (ids, tenant) in written.items()
            if key in self._condemned or self._is_erased(ids, tenant)
        ]

    def _from_tiers(self) -> list[Exception]:
        """Erase from the tiers what is gone from memory; returns what they refused."""
        tiers = self._runtime.tiers
        if tiers is None or not (self._files or self._unsynced):
            return []
        refused: list[Exception] = []
        for key in list(self._files):
            try:
                tiers.remove(key)
            except Exception as error:
                refused.append(error)
            else:
                self._files.discard(key)
        self._unsynced = True
        try:
            tiers.sync()
            self._unsynced = False
        except Exception as error:
            refused.append(error)
        return refused

    def _finish_notices(self) -> list[Exception]:
        """Go through the folder, the tiers and the passage, once for all notices; returns what failed."""
        told = list(self.notices.unfinished)
        if not told:
            return []
        for notice in told:
            self._runtime.forget_passage(notice)
        refused = self._sweep(told)
        if not refused:
            self.notices.finish(told)
        return refused

    def _from_conversations(self) -> list[Exception]:
        """Have conversations forget erased tokens, of turns too whose records are below memory only."""
        if self._remembered:
            try:
                self._runtime.conversations.erase(self._is_erased)
            except Exception as error:  # a memory of another distribution may raise anything
                return [error]
            self._remembered = False
        return []

    def _condemn(self, now: float) -> None:
        """Note the chunks of erased text that wait to be built: a busy engine builds them long after a notice."""
        if not (self.notices.in_force or self._condemned):
            return
        condemned = {key: until for key, until in self._condemned.items() if until > now}
        for chunk in self._waiting():
            if chunk.key in self._checked:
                continue
            if chunk.key in condemned or self._is_erased(chunk.ids, chunk.prefix.tenant.owner):
                condemned[chunk.key] = now + NOTICE_S
            else:
                self._checked.add(chunk.key)
        self._condemned = condemned

    def _waiting(self) -> list[MissingChunk]:
        while True:
            try:
                return list(self._runtime.missing)
            except RuntimeError:  # the scheduler changed it meanwhile
                continue

    def _from_memory(self) -> int:
        """Erase what is in the store, except what was looked at since the last notice."""
        store = self._runtime.store
        gone = []
        for key in store.keys():  # noqa: SIM118 - a list, not a mapping
            if key in self._checked:
                continue
            with store.borrow(key) as record:
                if record is not None and self.is_in(record, store.tenant_of(key)):
                    gone.append(key)
                else:
                    # Not those that are erased: the same chunk may be computed once more.
                    self._checked.add(key)
        self._files.update(gone)
        self._unforgotten.update(gone)
        store.erase(gone)
        if self._unforgotten:
            self._runtime.conversations.forget(list(self._unforgotten))
            self._unforgotten.clear()
        self._runtime.metrics.count_tier("memory", "erased", len(gone))
        return len(gone)

    def _sweep(self, told: list[Notice]) -> list[Exception]:
        """Erase from this engine's tiers, where whoever deleted did not know them; returns what refused."""
        path, chain = self._runtime.config.store_dir, self._runtime.tiers
        erasures: list[Callable[[], int]] = []
        if path and self._runtime.config.tier == "disk":
            here = [n for n in told if str(Path(path).absolute()) not in n.folders]
            if here:
                erasures.append(lambda: sweep_folder(Path(path), here))
        # No other process need know the other places.
        everywhere = [dataclasses.replace(n, reach=n.reach.among_servers()) for n in told]
        facts = self._runtime.facts
        models = (
            {} if facts is None else {str(facts.context_fields["model_fingerprint"]): self._model}
        )
        erasures += [
            functools.partial(sweep, tier, everywhere, models=models)
            for name, tier in ({} if chain is None else chain.tiers).items()
            if name != "disk"
        ]
        refused: list[Exception] = []
        for erase in erasures:
            try:
                erase()
            except Exception as error:
                refused.append(error)
        return refused

    def _is_erased(self, token_ids: npt.NDArray[Any], tenant: str) -> bool:
        notices_now = [n for n in self._combined_now() if not n.reach.spares(tenant)]
        if not notices_now:
            return False
        text = self._text(token_ids)
        return any(notice.is_about(text, tenant) for notice in notices_now)

    def _combined_now(self) -> list[Notice]:
        in_force, known = self.notices.in_force, self._combined
        if known[0] is not in_force:  # it is replaced, never changed
            known = self._combined = in_force, combined(notice for _, notice in in_force)
        return known[1]

    def _text(self, token_ids: npt.NDArray[Any]) -> str | None:
        """Text of tokens; None where it cannot be read, so that it may be anything."""
        if self._decode is None:
            self._decode = decoder_of(Path(self._model))
        try:
            return self._decode(token_ids) if self._decode is not None else None
        except Exception as error:
            self._say(error)
            return None

    def _run(self) -> None:
        while True:
            try:
                self.look()
            except Exception as error:
                # The thread goes on: the next look does it again, and nothing else erases.
                self._say(error)
            time.sleep(LOOK_S)

    def _say(self, error: Exception) -> None:
        self._runtime.say_once("erased", "Erased text may still be in chunk KV: %s", error)
