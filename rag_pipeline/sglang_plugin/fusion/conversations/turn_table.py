"""Which turns of which conversation are stored, and which of them a prompt goes through."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from chunk_cache import ChunkKey, KVContext, Match, MemoryStore, hash_token_ids
from rag_pipeline.sglang_plugin.fusion.conversations.lineage import Lineage
from rag_pipeline.sglang_plugin.fusion.runtime.fair_table import FairTable

TokenArray = npt.NDArray[np.int64]

_MAX_CONVERSATIONS = 1024
MAX_TURNS = 256
"""Of one conversation, those that branch off among them."""
_MAX_BRANCHES = 8
"""Of one conversation, newest first, that are gone through for what a cut prompt holds."""
_MAX_PLACES = 8
"""Of one branch, at which what a cut prompt goes on with may have stood."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredTurn:
    """What one turn added: tokens ``[start, end)`` of its prompt and answer.

    Attributes
    ----------
    lineage : Lineage
        What it was computed behind.
    ids : ndarray
        int64 token ids.
    key : ChunkKey
        Its record in the chunk store.
    context : KVContext or None
        Of the key; None as long as only a tier has told that the key is that of this turn.
    """

    lineage: Lineage
    ids: TokenArray
    key: ChunkKey
    context: KVContext | None = None

    @property
    def start(self) -> int:
        """First position."""
        return self.lineage.start

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + int(self.ids.size)

    @property
    def before(self) -> str:
        """Hash of all tokens in front of it."""
        return self.lineage.before

    @functools.cached_property
    def number(self) -> int:
        """Of this turn: the same wherever and whenever it is computed."""
        return self.lineage.number(self.ids)

    @property
    def parent(self) -> int:
        """Number of the turn that it was computed behind; 0 for the exact prefix alone."""
        return self.lineage.parent

    @property
    def exact(self) -> bool:
        """Plain prefill computed it, and all in front of it."""
        return self.lineage.is_exact


Chain = list[tuple[StoredTurn, Match]]
"""Turns that a prompt goes through, each with the run of it that fits; rising, disjoint."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MovedRun:
    """Part of the turns that a prompt goes through at a smaller position than theirs.

    Attributes
    ----------
    number : int
        Of the last turn of the branch that they are of.
    distance : int
        Old position minus the new one, tokens; positive.
    matches : tuple of Match
        In prompt order, each touching the next.
    """

    number: int
    distance: int
    matches: tuple[Match, ...]


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
        self._absent: set[ChunkKey] = set()
        """What no tier had when it was looked for last."""
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
            match = _run_of(turn, prompt, hashes)
            if match is None or (not turn.exact and turn.parent not in chains):
                continue
            if turn.exact:
                exact.append((turn, match))
                continue
            chain = _cut(chains[turn.parent], match.prompt_start)
            chains[turn.number] = chain = [*chain, (turn, match)]
            if not fused or match.prompt_end > fused[-1][1].prompt_end:
                fused = chain
        if not exact:
            return fused
        exact = _disjoint(exact)
        if not fused:
            return exact
        with_fused = [*_cut(exact, fused[0][1].prompt_start), *fused]
        return with_fused if _tokens(with_fused) > _tokens(exact) else exact

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
            match = _run_of(turn, ids, hashes) if turn.exact else None
            if match is not None:
                held.append((turn, match))
        found, at, parent = [], low, 0
        for turn, match in _disjoint(held):
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
        for path in itertools.islice(_branches(self.alive(namespace, tenant)), _MAX_BRANCHES):
            first, last = path[0], path[-1]
            if first.start >= prompt.size or hash_token_ids(prompt[: first.start]) != first.before:
                continue
            ends = [*(turn.start for turn in path[1:]), last.start + last.ids.size]
            content = np.concatenate(
                [turn.ids[: end - turn.start] for turn, end in zip(path, ends, strict=True)]
            )
            same = _same_length(prompt[first.start :], content)
            rest = prompt[first.start + same :]
            for place in _places_of(rest[:at_least], content, behind=same):
                found = _same_length(rest, content[place:])
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
                match = _run_of(turn, ids, hashes)
                # Other chats begin alike, by a template; and an answer may have been left before its end.
                if match is None or 2 * match.num_tokens < turn.ids.size:
                    self._store.evict(turn.key)
                    turns = [one for one in turns if one is not turn]
                    self._put(namespace, tenant, turns)
                    break
            return len(turns) < MAX_TURNS

    def add(self, turn: StoredTurn, *, tenant: str = "") -> None:
        """Remember a turn whose record is in the store, or in a tier below it."""
        namespace = turn.lineage.space
        with self._lock:
            self._absent.discard(turn.key)
            held = self._spaces.get(tenant, namespace) or []
            if any(one.key == turn.key for one in held):
                # In its place: what was computed behind it must stay behind it.
                turns = [turn if one.key == turn.key else one for one in held]
            else:
                turns = [*held, turn]
            for forgotten in self._spaces.put(tenant, namespace, turns, _MAX_CONVERSATIONS):
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
            self._absent.add(key)

    def drop(self, namespace: str, *, tenant: str = "") -> None:
        """Forget a conversation, and evict its records."""
        with self._lock:
            for turn in self._spaces.get(tenant, namespace) or ():
                self._store.evict(turn.key)
            self._spaces.pop(tenant, namespace)

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
                self._absent -= {turn.key for turn in turns}
            return alive

    def _put(self, namespace: str, tenant: str, turns: list[StoredTurn]) -> None:
        if turns:
            self._spaces.put(tenant, namespace, turns, _MAX_CONVERSATIONS)
        else:
            self._spaces.pop(tenant, namespace)

    def _is_there(self, key: ChunkKey) -> bool:
        return self._store.can_lease(key) or (self._is_kept_below() and key not in self._absent)


def _run_of(turn: StoredTurn, prompt: TokenArray, hashes: dict[int, str]) -> Match | None:
    """Part of a turn that a prompt goes through behind the very tokens that stood in front of it."""
    start = turn.start
    if start >= prompt.size or prompt[start] != turn.ids[0]:
        return None
    if start not in hashes:
        hashes[start] = hash_token_ids(prompt[:start])
    if hashes[start] != turn.before:
        return None
    return Match(start, start + _same_length(prompt[start:], turn.ids), turn.key)


def _cut(chain: Chain, end: int) -> Chain:
    """Part of a chain in front of a position: a turn may have left the one before it early."""
    return [(turn, m.clipped(m.prompt_start, end)) for turn, m in chain if m.prompt_start < end]


def _disjoint(chain: Chain) -> Chain:
    """Runs in the order of the prompt, each without what an earlier one holds."""
    found: Chain = []
    at = 0
    for turn, match in sorted(chain, key=lambda one: (one[1].prompt_start, -one[1].prompt_end)):
        if match.prompt_end > at:
            found.append((turn, match.clipped(at, match.prompt_end)))
            at = match.prompt_end
    return found


def _tokens(chain: Chain) -> int:
    return sum(match.num_tokens for _, match in chain)


def _branches(turns: list[StoredTurn]) -> Iterator[list[StoredTurn]]:
    """Chains from a first turn to one that nothing was computed behind; the newest first."""
    by_number = {turn.number: turn for turn in turns}
    parents = {turn.parent for turn in turns}
    for last in reversed(turns):
        if last.number not in parents:
            path = [last]
            while path[0].parent in by_number:
                path.insert(0, by_number[path[0].parent])
            yield path


def _same_length(one: TokenArray, two: TokenArray) -> int:
    """Tokens that two runs begin with alike."""
    size = min(one.size, two.size)
    differs = np.flatnonzero(one[:size] != two[:size])
    return int(differs[0]) if differs.size else size


def _places_of(run: TokenArray, content: TokenArray, *, behind: int) -> list[int]:
    """Offsets past ``behind`` at which a run stands in the content; the first few."""
    last = content.size - run.size
    if not run.size or last <= behind:
        return []
    places = np.arange(behind + 1, last + 1)
    for step, token in enumerate(run):
        places = places[content[places + step] == token]
    found: list[int] = places[:_MAX_PLACES].tolist()
    return found
