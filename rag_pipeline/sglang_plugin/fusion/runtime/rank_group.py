"""Agreement of tensor-parallel ranks: every rank loads the same spans, computes the same rows, starts the same builds.

Ranks run the scheduler in step on the same requests, but each keeps its own head shard of every chunk: a record may
be lost, refused or damaged on one rank only, clocks differ, memory runs out on one. So whatever decides a shape,
a collective or a request is put to the vote, and a rank that fails before a vote says so in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class RankFaultError(RuntimeError):
    """Some rank could not do its part; raised at the same vote on every rank."""


class RankGroup:
    """The attention tensor-parallel group, or a stand-in for one rank.

    Every method that is a vote must be called by all ranks together.

    Parameters
    ----------
    coordinator : object or None
        SGLang's group coordinator (``cpu_group``, ``device_group``, ``world_size``, ``rank_in_group``).
    """

    def __init__(self, coordinator: Any = None) -> None:
        self._coordinator = coordinator
        self.size: int = 1 if coordinator is None else int(coordinator.world_size)
        self.rank: int = 0 if coordinator is None else int(coordinator.rank_in_group)

    # -- votes --------------------------------------------------------------------------------

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Do a piece of work on every rank; return what it gave on each, by rank.

        Parameters
        ----------
        work : callable
            Whatever of this rank may fail belongs in here.

        Raises
        ------
        RankFaultError
            On every rank, if the work raised on any; with one rank the exception itself.
        """
        if self.size == 1:
            return [work()]
        result, fault = None, None
        try:
            result = work()
        except Exception as error:
            fault = error
        votes = self._exchange((fault is None, result))
        faulty = [rank for rank, (is_fine, _) in enumerate(votes) if not is_fine]
        if faulty:
            raise RankFaultError(f"rank {faulty[0]} failed before a vote") from fault
        return [value for _, value in votes]

    def common(self, work: Callable[[], Sequence[tuple[Any, ...]]]) -> set[tuple[Any, ...]]:
        """Those items that the work gives on every rank."""
        return set.intersection(*(set(items) for items in self.gather(work)))

    def all_true(self, value: bool) -> bool:
        """Whether the value is true on every rank."""
        return all(self.gather(lambda: value))

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Leave the block alike on all ranks: by its end, or by an exception on every one.

        There may be votes in the block. A rank that raises says so in the vote that the others are at next, or at
        the end; tensors are therefore reduced right behind a vote only.
        """
        try:
            yield
        except RankFaultError:
            raise  # from a vote, so every rank knows
        except Exception as error:
            if self.size == 1:
                raise
            self._exchange((False, None))
            raise RankFaultError(f"rank {self.rank} failed: {error!r}") from error
        else:
            self.all_true(True)

    def _exchange(self, vote: tuple[bool, Any]) -> list[tuple[bool, Any]]:
        """Votes of all ranks, by rank."""
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, vote, group=self._coordinator.cpu_group)
        return gathered

    # -- tensors ------------------------------------------------------------------------------

    def first(self, tensor: Tensor) -> Tensor:
        """Return the first rank's tensor of integers on every rank."""
        if self.size == 1:
            return tensor
        return self.total(tensor if self.rank == 0 else torch.zeros_like(tensor))

    def mean(self, tensor: Tensor) -> Tensor:
        """Average over the ranks; the tensor itself where there is one."""
        if self.size == 1:
            return tensor
        return self.total(tensor) / self.size

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on each."""
        if self.size == 1:
            return tensor
        reduced = tensor.contiguous().clone()
        group = (
            self._coordinator.cpu_group
            if reduced.device.type == "cpu"
            else self._coordinator.device_group
        )
        torch.distributed.all_reduce(reduced, group=group)
        return reduced
