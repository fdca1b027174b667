"""Which records are there, as far as steps, answers and the engine have said."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from rag_pipeline.errors import one_line
from rag_pipeline.memory.bounded import BoundedTable

logger = logging.getLogger(__name__)

_KNOWN = 65_536
"""Memory ids that are remembered."""
_ASKED = 256
"""Memory ids in one question for what exists."""


class KnownRecords:
    """Memory ids whose records were seen; safe for several threads.

    Parameters
    ----------
    existing : callable, optional
        Of memory ids, those whose records the engine has; asked where nothing is known. It may raise: nothing exists then.
    """

    def __init__(self, existing: Callable[[Sequence[str]], Collection[str]] | None = None) -> None:
        self._existing = existing
        self._known: BoundedTable[str, bool] = BoundedTable(_KNOWN)
        # Said to exist, and then not loaded: in another namespace of the tenant, or damaged.
        self._doubted: BoundedTable[str, bool] = BoundedTable(_KNOWN)

    @property
    def can_ask(self) -> bool:
        """Whether the engine can be asked what exists."""
        return self._existing is not None

    def is_known(self, memory_id: str) -> bool:
        """Whether the record was there when it was last seen."""
        return bool(self._known.get(memory_id))

    def newest(self, ids: Sequence[str]) -> int:
        """Place of the last of these ids whose record is known to be there; -1 for none."""
        places = range(len(ids) - 1, -1, -1)
        return next((place for place in places if self.is_known(ids[place])), -1)

    def note(self, memory_id: str) -> None:
        """Note that a record is there, as a step or an answer has reported."""
        self._doubted.drop(memory_id)
        self._known.put(memory_id, True)

    def forget(self, memory_id: str) -> None:
        """Note that a record is gone, as an answer has reported; whoever says that it exists is not believed."""
        self._known.drop(memory_id)
        self._doubted.put(memory_id, True)

    def unlearn(self, ids: Iterable[str]) -> None:
        """Know nothing of these records any more; whoever says that one exists is believed."""
        for one in ids:
            self._known.drop(one)

    def find(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids whose records are there; asks the engine where that is possible."""
        known = {one for one in ids if self.is_known(one)}
        unknown = [one for one in ids if one not in known]
        return known | self._ask(unknown)

    def ask_backwards(self, ids: Sequence[str]) -> None:
        """Learn from the engine the newest of these that exist."""
        for end in range(len(ids), 0, -_ASKED):
            if self._ask(ids[max(0, end - _ASKED) : end]):
                return

    def _ask(self, ids: Sequence[str]) -> set[str]:
        if self._existing is None or not ids:
            return set()
        try:
            there = set(self._existing(list(ids))) & set(ids)
        except Exception as error:
            logger.warning("the engine did not say which memories exist: %s", one_line(error, 300))
            return set()
        there = {one for one in there if not self._doubted.get(one)}
        for one in there:
            self._known.put(one, True)
        return there
