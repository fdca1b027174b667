"""The contract of eviction policies: which stored item goes first."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from chunk_cache.errors import IntegrityError
from chunk_cache.eviction.ranking import Ranking


class WaitingJob(NamedTuple):
    """One request of the waiting queue, as a hint.

    Attributes
    ----------
    name : hashable
        Identity of the request, such as its id; the same in every queue that it waits in.
    keys : sequence of hashable
        Keys of the stored items that it will read, known or not. They are read once, when the job first shows.
    num_bytes : int
        What these items weigh together; 0 where the policy shall estimate it.
    """

    name: Hashable
    keys: Sequence[Any]
    num_bytes: int = 0


class StoredItem:
    """What a policy knows of one item.

    Attributes
    ----------
    key : hashable
        Its key.
    num_bytes : int
        Its weight.
    group : str
        Whose victim it can be.
    born, used : int
        Numbers that grow with time: when its session was first stored, and when the item was last used. ``used`` is
        unique.
    used_at : float
        Seconds of the last use.
    uses : int
        How often it was used since it was stored.
    is_held : bool
        It is nobody's victim now.
    """

    __slots__ = (
        "born",
        "group",
        "is_held",
        "key",
        "num_bytes",
        "session",
        "used",
        "used_at",
        "uses",
    )

    def __init__(
        self, key: Hashable, num_bytes: int, group: str, session: Hashable, is_held: bool
    ) -> None:
        self.key = key
        self.num_bytes = num_bytes
        self.group = group
        self.session = session
        self.is_held = is_held
        self.born = self.used = self.uses = 0
        self.used_at = 0.0


class EvictionPolicy(abc.ABC):
    """Order in which stored items are given up.

    The owner of the items (the ledger of the memory store, a simulator) tells the policy what is stored, used, held
    and gone. The policy answers :meth:`victims`. It removes nothing itself, and it never decides how much goes: budgets
    are the owner's business. An implementation needs :meth:`rank` only.

    **Groups.** Each item is in one group, and victims are asked for by group. The memory store makes one group per
    tenant, so that the tenant who holds most loses first and the policy orders the victims within it. The simulator
    makes one group per tier.

    **Cost.** Every method costs O(log n) amortised in the number of items, and each victim that is taken from
    :meth:`victims` O(log n). :meth:`note_queue` costs O(jobs) and O(log n) per key of the jobs that came or went.

    **Order.** The order depends on the calls only, and on ``now`` where an implementation says so. With tensor
    parallelism all ranks make the same calls, so they come to the same victims.

    **Locks.** None. The owner calls from one thread, or under its own lock. While an iterator of :meth:`victims` is in
    use, no other method may be called.

    Parameters
    ----------
    memory_bytes : int
        Budget of the memory tier.
    disk_bytes : int
        Budget of the tiers below it together; 0 for none.
    variant : str
        One of :attr:`variants`; empty for the first.

    Raises
    ------
    ValueError
        Negative bytes, or a variant that is not known; one line.
    """

    name: ClassVar[str] = ""
    """As the registry calls it; for messages."""
    variants: ClassVar[tuple[str, ...]] = ()
    """What may stand behind the name and a colon; the first is the default."""
    uses_queue: ClassVar[bool] = False
    """Whether :meth:`note_queue` does anything. If not, callers need not collect the queue."""
    needs_future: ClassVar[bool] = False
    """Whether the policy must know what will be asked for: a simulator can tell, an engine cannot."""

    def __init__(self, *, memory_bytes: int, disk_bytes: int = 0, variant: str = "") -> None:
        if memory_bytes < 0 or disk_bytes < 0:
            raise ValueError(
                f"eviction: memory_bytes={memory_bytes}, disk_bytes={disk_bytes}; give 0 or more."
            )
        if variant and variant not in self.variants:
            allowed = ", ".join(self.variants) or "none"
            raise ValueError(
                f"eviction policy {self.name!r} has no variant {variant!r}; allowed: {allowed}."
            )
        self.memory_bytes = memory_bytes
        self.disk_bytes = disk_bytes
        self.variant = variant or next(iter(self.variants), "")
        self.items: dict[Hashable, StoredItem] = {}
        self._rankings: dict[str, Ranking] = {}
        self._births: dict[Hashable, list[int]] = {}  # by session: number of its birth, items
        self._ticks = itertools.count(1)

    @property
    def reserve_bytes(self) -> int:
        """Bytes of memory that an owner keeps free beyond what it needs, as far as candidates allow."""
        return 0

    @abc.abstractmethod
    def rank(self, item: StoredItem) -> tuple[Any, ...]:
        """Say where an item stands among the candidates: the smallest rank is the first victim.

        Called when the item is stored, moved or released. A policy whose ranks change at other moments calls
        :meth:`rerank`. Ranks are compared with each other, and the method must not raise: the owner's books would be
        in disorder.
        """

    # -- what the owner reports ---------------------------------------------------------------

    def insert(
        self,
        key: Hashable,
        num_bytes: int,
        *,
        now: float = 0.0,
        group: str = "",
        session: Hashable = None,
        is_held: bool = False,
    ) -> StoredItem:
        """Note a stored item.

        Parameters
        ----------
        key : hashable
            Not stored yet.
        num_bytes : int
            Its weight.
        now : float
            Seconds of the owner's clock, which never goes back.
        group : str
            See the class.
        session : hashable, optional
            What it belongs to: items of one session are of one age. By default it is a session of its own.
        is_held : bool
            Whether it is held from the start, as after :meth:`hold`.

        Raises
        ------
        IntegrityError
            If the key is stored already.
        """
        if key in self.items:
            raise IntegrityError(f"eviction: {key} is stored twice")
        item = StoredItem(key, num_bytes, group, key if session is None else session, is_held)
        self.items[key] = item
        item.used = next(self._ticks)
        item.used_at = now
        birth = self._births.setdefault(item.session, [item.used, 0])
        birth[1] += 1
        item.born = birth[0]
        self.rerank(item)
        return item

    def hold(self, key: Hashable) -> None:
        """Take an item out of the candidates (leased, pinned). Does nothing if it is held."""
        item = self.items[key]
        if not item.is_held:
            item.is_held = True
            self._leave(item)

    def release(self, key: Hashable, now: float = 0.0) -> None:
        """Make a held item a candidate again, as just used."""
        item = self.items[key]
        item.is_held = False
        self._use(item, now)

    def use(self, key: Hashable, now: float = 0.0) -> None:
        """Note the use of an item that need not be held meanwhile."""
        self._use(self.items[key], now)

    def _use(self, item: StoredItem, now: float) -> None:
        item.used = next(self._ticks)
        item.used_at = now
        item.uses += 1
        self.rerank(item)

    def move(self, key: Hashable, group: str) -> None:
        """Put an item into another group; its age and its uses stay."""
        item = self.items[key]
        self._leave(item)
        item.group = group
        self.rerank(item)

    def remove(self, key: Hashable) -> None:
        """Forget an item."""
        item = self.items.pop(key)
        self._leave(item)
        birth = self._births[item.session]
        birth[1] -= 1
        if not birth[1]:
            del self._births[item.session]

    def rerank(self, item: StoredItem) -> None:
        """Ask :meth:`rank` again for an item; for implementations."""
        if item.is_held:
            return
        ranking = self._rankings.get(item.group)
        if ranking is None:
            ranking = self._rankings[item.group] = Ranking()
        ranking.set(item.key, self.rank(item))

    def _leave(self, item: StoredItem) -> None:
        ranking = self._rankings.get(item.group)
        if ranking is not None and ranking.discard(item.key) and not ranking:
            del self._rankings[item.group]

    # -- what the owner asks ------------------------------------------------------------------

    def victims(self, group: str = "", now: float = 0.0) -> Iterator[Any]:
        """Candidates of a group, the first to go first. Nothing is removed.

        Parameters
        ----------
        group : str
            See the class.
        now : float
            As of :meth:`insert`.
        """
        return iter(self._rankings.get(group, ()))

    def groups(self) -> list[str]:
        """Groups that have candidates."""
        return list(self._rankings)

    # -- the waiting queue --------------------------------------------------------------------

    def note_queue(self, jobs: Iterable[WaitingJob]) -> None:  # noqa: B027 - most policies have no use for it
        """Take the whole waiting queue as a hint, the next job first.

        Called whenever the queue has changed, at most once per scheduling step. A wrong or outdated hint costs hits,
        never correctness. By default nothing is done, and the jobs are not even looked at.
        """

    def awaited(self) -> Iterator[Any]:
        """Keys that jobs of the queue will read, stored or not, the next first; by default none."""
        return iter(())

    def jobs_to_prefetch(self) -> Iterator[WaitingJob]:
        """Jobs whose items are worth fetching into memory ahead of them, the next first; by default none."""
        return iter(())

    def check(self) -> None:
        """Check that the candidates are exactly the items that nobody holds.

        Raises
        ------
        IntegrityError
            Naming the first contradiction.
        """
        for ranking in self._rankings.values():
            ranking.check()
        listed = {(group, key) for group, row in self._rankings.items() for key in row}
        free = {(item.group, key) for key, item in self.items.items() if not item.is_held}
        if listed != free or not all(self._rankings.values()):
            raise IntegrityError("eviction: the candidates are not the items that nobody holds")
        counts: dict[Hashable, int] = {}
        for item in self.items.values():
            counts[item.session] = counts.get(item.session, 0) + 1
        if counts != {session: birth[1] for session, birth in self._births.items()}:
            raise IntegrityError("eviction: the sessions do not have the items that are stored")
