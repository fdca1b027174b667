"""The contract of a conversation memory: what the turns of a conversation leave for the following ones."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    import threading

    from chunk_cache import Candidate, ChunkKey, KVContext, Tier
    from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
    from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


IsErased = Callable[[npt.NDArray[Any], str], bool]
"""Whether token ids of a tenant (:func:`chunk_cache.tenant_mark`) hold erased text."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FinishedTurn:
    """A request that ended well, its slots not yet given back.

    Attributes
    ----------
    state : RequestState
        Of the request; its leases are released already.
    tenant : RadixNamespace
        Whose it is.
    ids : ndarray
        int64 ``[kv_len]``: prompt and answer, as far as their KV is in the pool.
    pool : MHATokenToKVPool
        The paged pool.
    slots : Tensor
        int64 ``[kv_len]`` on the pool's device; slot ``j`` holds the KV of position ``j``.
    """

    state: RequestState
    tenant: RadixNamespace
    ids: npt.NDArray[np.int64]
    pool: Any
    slots: Tensor

    @property
    def kv_len(self) -> int:
        """Positions whose KV may be kept."""
        return int(self.ids.size)


class ConversationMemory(ABC):
    """Decides what a conversation keeps of a turn and what the next turn loads of it. One per scheduler process.

    The scheduler thread alone calls ``wanted``, ``lease`` and ``keep``, for requests that name a conversation. The thread
    that erases text calls :meth:`forget` and :meth:`erase` meanwhile.

    *KV* belongs into records of ``runtime.store``, under keys whose context holds all that the KV depends on: in its
    ``tenant`` the tenant's salt alone, by which erasure reaches it, in its ``prefix_digest`` the conversation, the
    policy's identity, the tokens in front (:class:`~.lineage.Lineage`). The store then bounds it, evicts it
    and erases it with deleted text; a record in use is never evicted. Given to ``write_record`` of
    :mod:`~.builds.persistence`, it outlives memory and the process. A memory itself holds tables over such records
    (positions, hashes, embeddings), bounded, with a fair share for each tenant, and finds out by
    ``store.acquire_matches`` that a record is gone.

    *Ranks* of a tensor-parallel engine each have a memory, and all call the same method for the same request. A
    decision that may differ between them (whether a record is there, whether a copy was stored) is a vote of
    ``runtime.group``; behind the vote nothing is done that can fail on one rank. All work in front of it stands in
    the callable that is handed to ``gather``, so that a rank that fails takes the others along instead of leaving
    them waiting. Numbers drawn by a memory must mean the same computation on every rank.

    *Faults* cost speed only: whatever ``lease`` raises makes the request ordinary and releases what the state was
    given by then; whatever ``keep`` raises is logged and counted, and the turn is not kept.

    *Limits.* What a memory does not lease is computed: it can leave no token of the past unread. Memories of a fixed
    number of slots (EpiCache, arXiv 2509.17396) are another thing: a client lays out a shorter prompt for them
    (:mod:`rag_pipeline.protocol.memory_step`), and the room ``memory`` loads and makes their records.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process; made but not started: read store, group and facts when they are needed.

    Attributes
    ----------
    name : str
        As settings and messages call it.
    """

    name: ClassVar[str]

    def __init__(self, runtime: FusionRuntime) -> None:
        self.runtime = runtime

    @abstractmethod
    def lease(self, state: RequestState, tenant: RadixNamespace) -> None:
        """Lease what earlier turns left behind the exact prefix of a request that is being admitted.

        Called at every scheduling attempt, after ``state.radix_len`` is known and before chunks are looked up. A
        lease is given to the state at once (``state.lease``), so that a fault releases it. In the end the state
        is told by ``state.set_turns``: spans rising, disjoint, behind ``state.radix_len``, ``is_turn`` each (no
        policy recomputes them), where they end, and a number that ``keep`` finds as ``state.turn``. Chunks are then
        loaded behind that end only. With nothing to lease the state is left as it is.

        Parameters
        ----------
        state : RequestState
            Changed by its methods.
        tenant : RadixNamespace
            Whose request it is; nothing of another namespace may be leased.
        """

    @abstractmethod
    def keep(self, turn: FinishedTurn) -> bool:
        """Keep what the following turns may load of a finished one; returns whether anything is kept.

        Called before the request's slots are freed and the radix tree gets its exact part; KV is copied out of the
        pool here or never. It holds up the scheduler: no model is run here. Slots and pool are only read.

        ``turn.state.approximate_from`` is the first position whose KV is not what plain prefill computes; None where all
        is. ``exact_limit`` may be smaller: the tree takes nothing behind the first token that was loaded, exact or not.
        """

    def wanted(self, state: RequestState, tenant: RadixNamespace) -> Sequence[Candidate]:
        """Records that :meth:`lease` would use, in memory or not; those that are not are fetched from the tiers below.

        Called when a request comes, so that they arrive while it waits. By default none.
        """
        return ()

    def look_up(self, state: RequestState, tenant: RadixNamespace) -> threading.Event | None:
        """Begin to ask tiers that are not listed at a start what they have of a request's conversation. Never waits.

        Called when a request comes. As soon as the event is set, :meth:`wanted` is asked once more. By default none.
        """
        return None

    def group_of(self, context: KVContext) -> str | None:
        """Name of the group (:meth:`chunk_cache.Tier.note_member`) of the records of a context; by default none.

        Called from the threads that write to the tiers.
        """
        return None

    def restore(self, tier: Tier, namespaces: Collection[str]) -> int:
        """Take up what earlier processes left in a tier; returns how many records. By default none.

        Called while the engine starts, by each rank with its own records, after memory was filled from the tier.

        Parameters
        ----------
        tier : Tier
            Of the records, the nearest.
        namespaces : collection of str
            Of this model and rank, and of the tenants that are served. What a tier tells of one
            (:meth:`chunk_cache.Tier.describe`) may be wrong, and the tenant's salt is not in it: keys must be compared
            with those of a request before anything is leased.
        """
        return 0

    def erase(self, is_erased: IsErased) -> None:  # noqa: B027
        """Forget what holds erased text. Called from the erasing thread, at every new notice."""

    def forget(self, keys: Collection[ChunkKey] | None = None) -> None:  # noqa: B027
        """Forget what was derived from records that are gone for good.

        Parameters
        ----------
        keys : collection of ChunkKey, optional
            Records that were erased with deleted text: called from the erasing thread, after the store lost them,
            and some of them are chunks that no turn left. None for all: the weights have changed and the store is
            empty; called in the scheduler thread, on every rank.
        """
