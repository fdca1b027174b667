"""Which turns of which conversation are stored, and which of them a prompt goes through."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable

import numpy as np

from chunk_cache import ChunkKey, KVContext, Match, MemoryStore, hash_token_ids
from rag_pipeline.sglang_plugin.fusion.conversations.lineage import Lineage
from rag_pipeline.sglang_plugin.fusion.conversations.stored_turns import (
    Chain,
    MovedRun,
    StoredTurn,
    TokenArray,
    branches,
    cut_at,
    disjoint,
    num_tokens,
    places_of,
    run_of,
    same_length,
)
from rag_pipeline.sglang_plugin.fusion.runtime.fair_table import FairTable

_MAX_CONVERSATIONS = 1024
MAX_TURNS = 256
"""Of one conversation, those that branch off among them."""
_MAX_ABSENT = 4096
"""Of all conversations; a turn whose note is dropped is looked for once more."""
_MAX_BRANCHES = 8
"""Of one conversation, newest first, that are gone through for what a cut prompt holds."""


class TurnTable:
    """Turns by namespace; of the tenant with most conversations the least recently used is forgotten first.

    Its methods may be called from several threads: text is erased in another one than turns are kept in.

    Parameters
    ----------
    store : MemoryStore
        Holds the records.
    is_kept_below : callable
        Whether what memory has evicted may still be in a tier below it. If not, a turn whose record was evicted is
        forgotten, and with a fused one all that were computed behind it.
    """

    def __init__(
        self, store: MemoryStore, is_kept_below: Callable[[], bool] = lambda: False
    ) -> None:
        self._store = store
        self._is_kept_below = is_kept_below
        self._spaces: FairTable[str, list[StoredTurn]] = FairTable()
        self._absent: dict[ChunkKey, None] = {}
        """What no tier had when it was looked for last, in the order in which it was noted."""
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Count the conversations."""
        return len(self._spaces)

    def clear(self) -> None:
        """Forget all conversations; their records are up to the store."""
        with self._lock:
            self._spaces.clear()
            self._absent.clear()

    def find(self, namespace: str, prompt: TokenArray, *, tenant: str = "") -> Chain:
        """Turns that the prompt goes through, each with the run of it that fits.

        Exact turns need nothing but the same tokens in front of them, so one that is gone leaves a gap. Fused ones are
        a chain, each computed behind the one before it, with exact turns in front of the first. Of both ways the one
        that holds more tokens.

        Parameters
        ----------
        namespace : str
            Of the conversation.
        prompt : ndarray
            int64 token ids.
        tenant : str
            Whose conversation it is.
        """
        turns = self.alive(namespace, tenant)
        hashes: dict[int, str] = {}
        # Chain of fused turns that ends in a turn, by its number; a parent always comes before its children.
        chains: dict[int, Chain] = {0: []}
        fused: Chain = []
        exact: Chain = []
        for turn in turns:
            match = run_of(turn, prompt, hashes)
            if match is None or (not turn.exact and turn.parent not in chains):
                continue
            if turn.exact:
                exact.append((turn, match))
                continue
            chain = cut_at(chains[turn.parent], match.prompt_start)
            chains[turn.number] = chain = [*chain, (turn, match)]
            if not fused or match.prompt_end > fused[-1][1].prompt_end:
                fused = chain
        if not exact:
            return fused
        exact = disjoint(exact)
        if not fused:
            return exact
        with_fused = [*cut_at(exact, fused[0][1].prompt_start), *fused]
        return with_fused if num_tokens(with_fused) > num_tokens(exact) else exact

    def gaps(
        self, namespace: str, ids: TokenArray, low: int, high: int, *, tenant: str = ""
    ) -> list[tuple[int, int, int]]:
        """Parts of ``[low, high)`` that no exact turn holds which is still somewhere.

        Returns
        -------
        list of (int, int, int)
            First position, one past the last, and the number of the exact turn in front of it, 0 for none.
        """
        hashes: dict[int, str] = {}
        held: Chain = []
        for turn in self.alive(namespace, tenant):
            match = run_of(turn, ids, hashes) if turn.exact else None
            if match is not None:
                held.append((turn, match))
        found, at, parent = [], low, 0
        for turn, match in disjoint(held):
            if at < min(match.prompt_start, high):
                found.append((at, min(match.prompt_start, high), parent))
            if match.prompt_end > at:
                at, parent = match.prompt_end, turn.number
        return [*found, (at, high, parent)] if at < high else found

    def find_moved(
        self, namespace: str, prompt: TokenArray, *, tenant: str = "", at_least: int = 1
    ) -> MovedRun | None:
        """Longest run that the prompt goes on with where it leaves a branch of turns: what stood in between was cut.

        Parameters
        ----------
        namespace : str
            Of the conversation.
        prompt : ndarray
            int64 token ids.
        tenant : str
            Whose conversation it is.
        at_least : int
            Shortest run that is worth it, tokens.
        """
        best: MovedRun | None = None
        length = at_least - 1
        for path in itertools.islice(branches(self.alive(namespace, tenant)), _MAX_BRANCHES):
            first, last = path[0], path[-1]
            if first.start >= prompt.size or hash_token_ids(prompt[: first.start]) != first.before:
                continue
            ends = [*(turn.start for turn in path[1:]), last.start + last.ids.size]
            content = np.concatenate(
                [turn.ids[: end - turn.start] for turn, end in zip(path, ends, strict=True)]
            )
            same = same_length(prompt[first.start :], content)
            rest = prompt[first.start + same :]
            for place in places_of(rest[:at_least], content, behind=same):
                found = same_length(rest, content[place:])
                if found <= length:
                    continue
                length, distance = found, place - same
                low = first.start + place
                matches = [
                    Match(start - distance, end - distance, turn.key, start - turn.start)
                    for turn, turn_end in zip(path, ends, strict=True)
                    if (start := max(turn.start, low)) < (end := min(turn_end, low + found))
                ]
                best = MovedRun(number=last.number, distance=distance, matches=tuple(matches))
        return best

    def has_room(self, namespace: str, ids: TokenArray, *, tenant: str = "") -> bool:
        """Whether a conversation may still grow.

        A full one forgets the oldest turn for it that these tokens do not go through: a client may give one name to all
        that it asks. Turns that they do go through stay, or each new one would cost an old one of the same chat.
        """
        with self._lock:
            turns = self.alive(namespace, tenant)
            hashes: dict[int, str] = {}
            for turn in turns if len(turns) >= MAX_TURNS else ():
                match = run_of(turn, ids, hashes)
                # Other chats begin alike, by a template; and an answer may have been left before its end.
                if match is None or 2 * match.num_tokens < turn.ids.size:
                    self._store.evict(turn.key)
                    turns = [one for one in turns if one is not turn]
                    self._put(namespace, tenant, turns)
                    break
            return len(turns) < MAX_TURNS

    def add(self, turn: StoredTurn, *, tenant: str = "") -> None:
        """Remember a turn whose record is in the store, or in a tier below it.

        A turn that is computed once more keeps its place: those that were computed behind it stand behind it.
        """
        namespace = turn.lineage.space
        with self._lock:
            self._absent.pop(turn.key, None)
            turns = {held.key: held for held in self._spaces.get(tenant, namespace) or ()}
            turns[turn.key] = turn
            listed = list(turns.values())
            for forgotten in self._spaces.put(tenant, namespace, listed, _MAX_CONVERSATIONS):
                for old in forgotten:
                    self._store.evict(old.key)

    def confirm(
        self,
        namespace: str,
        context_of: Callable[[Lineage], KVContext],
        *,
        tenant: str = "",
    ) -> None:
        """Check the turns that a tier told of, and forget those whose key is not that of the lineage that was told."""
        with self._lock:
            turns = self._spaces.get(tenant, namespace) or []
            if all(turn.context is not None for turn in turns):
                return
            confirmed: list[StoredTurn] = []
            for turn in turns:
                context = turn.context or context_of(turn.lineage)
                if turn.context is not None or ChunkKey.of(context, turn.ids) == turn.key:
                    confirmed.append(dataclasses.replace(turn, context=context))
            self._put(namespace, tenant, confirmed)

    def note_absent(self, key: ChunkKey) -> None:
        """Forget a turn soon: its record was looked for, and is neither in memory nor below."""
        with self._lock:
            self._absent[key] = None
            # A conversation that nobody asks for again, or that was forgotten, leaves its notes.
            while len(self._absent) > _MAX_ABSENT:
                del self._absent[next(iter(self._absent))]

    def forget(self, is_gone: Callable[[StoredTurn, str], bool]) -> None:
        """Forget turns, of which the tokens must not stay; the callable gets a turn and whose it is.

        It may read the text of every turn, which takes seconds: meanwhile the scheduler goes on.
        """
        with self._lock:
            rows = self._spaces.items()
        gone = {turn.key for tenant, _, turns in rows for turn in turns if is_gone(turn, tenant)}
        with self._lock:
            for tenant, namespace, turns in self._spaces.items() if gone else ():
                left = [turn for turn in turns if turn.key not in gone]
                if len(left) < len(turns):
                    self._put(namespace, tenant, left)

    def alive(self, namespace: str, tenant: str = "") -> list[StoredTurn]:
        """Turns of a conversation whose records are in memory, or may be below."""
        with self._lock:
            turns = self._spaces.get(tenant, namespace) or []
            alive: list[StoredTurn] = []
            numbers = {0}
            for turn in turns:
                if not turn.exact and turn.parent not in numbers:
                    continue  # what it was computed behind can never be loaded again
                if self._is_there(turn.key):
                    alive.append(turn)
                    numbers.add(turn.number)
            if turns:
                self._put(namespace, tenant, alive)
                for turn in turns:
                    self._absent.pop(turn.key, None)
            return alive

    def _put(self, namespace: str, tenant: str, turns: list[StoredTurn]) -> None:
        if turns:
            self._spaces.put(tenant, namespace, turns, _MAX_CONVERSATIONS)
        else:
            self._spaces.pop(tenant, namespace)

    def _is_there(self, key: ChunkKey) -> bool:
        return self._store.can_lease(key) or (self._is_kept_below() and key not in self._absent)
