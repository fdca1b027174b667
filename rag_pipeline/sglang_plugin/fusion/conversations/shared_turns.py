"""Turns that other processes, or earlier lives of this one, left in a tier that several servers share.

Such a tier is not listed at an engine's start: it may hold millions. It keeps one small list per conversation instead,
whose name follows from contents as a key does (:func:`group_of`), and which is read when a request of the conversation
comes. A thread of its own asks, so that nobody waits longer than for the header of a chunk: what comes later serves the
next request. What is told is checked before it is used, as of every tier (:meth:`~.turn_table.TurnTable.confirm`).
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from chunk_cache import Candidate, ChunkKey, KVContext, as_token_ids
from rag_pipeline.sglang_plugin.fusion.conversations.lineage import Lineage
from rag_pipeline.sglang_plugin.fusion.conversations.stored_turns import StoredTurn
from rag_pipeline.sglang_plugin.fusion.conversations.turn_table import MAX_TURNS, TurnTable
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

_MAX_WAITING = 256
"""Conversations that wait for their turn to be asked for."""


def group_of(context: KVContext, space: str) -> str:
    """Name of the list of a conversation's turns: of this model, rank and tenant, which the context says."""
    return dataclasses.replace(context, prefix_digest=f"turns:1:{space}").namespace


class _Question(NamedTuple):
    context: KVContext
    """Of any turn of the conversation."""
    space: str
    owner: str
    answered: threading.Event


class SharedTurns:
    """Asks the tiers for conversations, one after the other.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    table : TurnTable
        Where what is found is listed.
    """

    def __init__(self, runtime: FusionRuntime, table: TurnTable) -> None:
        self._runtime = runtime
        self._table = table
        self._queue: queue.SimpleQueue[_Question] = queue.SimpleQueue()
        self._waiting: dict[str, _Question] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ask(self, context: KVContext, space: str, owner: str) -> threading.Event | None:
        """Begin to ask for a conversation; the event is set when the table lists what there is.

        Parameters
        ----------
        context : KVContext
            With the request's tenant; its ``prefix_digest`` is not looked at.
        space : str
            Of the conversation's turns (:attr:`Lineage.space`).
        owner : str
            Whose they are.

        Returns
        -------
        threading.Event or None
            None where no tier can tell, or too many wait.
        """
        tiers = self._runtime.tiers
        # After an update of the weights no tier holds anything of them.
        if tiers is None or not tiers.has_groups or self._runtime.epoch:
            return None
        with self._lock:
            question = self._waiting.get(space)
            if question is None:
                if len(self._waiting) >= _MAX_WAITING:
                    self._runtime.metrics.count("turns", "not_looked_up")
                    return None
                question = _Question(context, space, owner, threading.Event())
                self._waiting[space] = question
                self._queue.put(question)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="chunk-kv-turns", daemon=True
                )
                self._thread.start()
        return question.answered

    def _run(self) -> None:
        while True:
            question = self._queue.get()
            try:
                self._take_up(question)
            except Exception as error:  # the next conversation may be told of all the same
                self._runtime.say_fault("restore", error)
            finally:
                with self._lock:
                    del self._waiting[question.space]
                question.answered.set()

    def _take_up(self, question: _Question) -> None:
        tiers = self._runtime.tiers
        if tiers is None:
            return
        space, owner = question.space, question.owner
        known = {turn.key for turn in self._table.alive(space, owner)}
        room = MAX_TURNS - len(known)
        members = tiers.members(group_of(question.context, space), known)
        found: list[StoredTurn] = []
        for member in members[-room:] if room > 0 else ():
            lineage = Lineage.decode(member.context.get("prefix_digest"))
            if lineage is not None and lineage.space == space:
                ids = member.token_ids.astype(np.int64)
                found.append(StoredTurn(lineage=lineage, ids=ids, key=member.key))
        number = 0
        for turn in sorted(found, key=lambda turn: turn.start):
            number += self._add(turn, question)
        if number:
            self._runtime.metrics.count("turns", "restored", number)

    def _add(self, turn: StoredTurn, question: _Question) -> bool:
        is_erased = self._is_erased(turn, question)
        if is_erased() or self._runtime.epoch:
            return False
        self._table.add(turn, tenant=question.owner)
        # It may have been erased meanwhile, by somebody who did not see it in the table yet.
        if is_erased() or self._runtime.epoch:
            key: ChunkKey = turn.key
            self._table.forget(lambda one, whose: one.key == key)
            return False
        return True

    def _is_erased(self, turn: StoredTurn, question: _Question) -> Callable[[], bool]:
        erased, owner = self._runtime.erased, question.owner
        one = Candidate(turn.key, as_token_ids(turn.ids), question.context, owner)
        return lambda: erased is not None and erased.is_in(one, owner)
