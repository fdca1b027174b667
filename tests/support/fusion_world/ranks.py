"""Several ranks in one process: one runs at a time, collectives hand over, and a rank that waits in vain is seen."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from fusion_world.server import Server
from rag_pipeline.sglang_plugin.fusion.builds import idle as background
from rag_pipeline.sglang_plugin.fusion.conversations.turns import TurnMemory
from rag_pipeline.sglang_plugin.fusion.request import internal as internal_requests
from rag_pipeline.sglang_plugin.fusion.runtime import runtime
from rag_pipeline.sglang_plugin.fusion.runtime.rank_group import RankGroup


class DivergedError(AssertionError):
    """A rank waits in a collective that another one does not enter: in production, both hang."""


def _globals() -> dict[tuple[Any, str], Any]:
    """State of a scheduler process that lives in modules."""
    return {
        (runtime, "_RUNTIME"): None,
        (background, "_idle"): 0,
        (internal_requests, "_NUMBERS"): itertools.count(1),
    }


class Ranks:
    """Servers that do everything together.

    Parameters
    ----------
    size : int
        How many; with one, nothing is exchanged.
    memory : type
        Conversation memory.
    """

    def __init__(self, size: int, memory: type[TurnMemory] = TurnMemory) -> None:
        self._turn = threading.Condition()
        self._boxes: list[list[Any]] = [[] for _ in range(size)]
        self._ended = [False] * size
        self.is_sound = True
        """False from the first violation on: what is left behind then says nothing."""
        self._diverged: DivergedError | None = None
        self._modules = [_globals() for _ in range(size)]
        groups = [
            RankGroup(
                SimpleNamespace(
                    world_size=size,
                    rank_in_group=rank,
                    cpu_group=(self, rank),
                    device_group=(self, rank),
                )
                if size > 1
                else None
            )
            for rank in range(size)
        ]
        self.servers = [Server(group, rank, size, memory) for rank, group in enumerate(groups)]
        for modules, server in zip(self._modules, self.servers, strict=True):
            modules[runtime, "_RUNTIME"] = server.runtime

    def each(self, action: Callable[[Server], Any]) -> None:
        """Let every rank do the same; then all must have done the same."""
        # The process may hold a real engine of another test, whose state comes back afterwards.
        of_others = {at: getattr(*at) for at in self._modules[0]}
        try:
            self._each(action)
        finally:
            for (module, name), value in of_others.items():
                setattr(module, name, value)

    def _each(self, action: Callable[[Server], Any]) -> None:
        size = len(self.servers)
        self._boxes, self._ended = [[] for _ in range(size)], [False] * size
        faults: list[BaseException | None] = [None] * size
        self.is_sound = False
        if size == 1:
            self._install(0)
            action(self.servers[0])
            self._keep(0)
            self.is_sound = True
            return

        def work(rank: int) -> None:
            with self._turn:
                self._install(rank)
                try:
                    action(self.servers[rank])
                except BaseException as error:
                    faults[rank] = error
                finally:
                    self._keep(rank)
                    self._ended[rank] = True
                    self._turn.notify_all()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._diverged is not None:
            raise self._diverged
        for fault in filter(None, faults):
            raise fault
        assert len({len(box) for box in self._boxes}) == 1, "ranks entered other collectives"
        self.is_sound = True

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Give a value, wait for those of the other ranks."""
        self._boxes[rank].append(value)
        at = len(self._boxes[rank]) - 1
        self._keep(rank)
        self._turn.notify_all()
        while not all(len(box) > at for box in self._boxes):
            if any(
                ended and len(box) <= at
                for ended, box in zip(self._ended, self._boxes, strict=True)
            ):
                # Fusion takes what is raised here for a fault of its own: it is raised again at the end.
                self._diverged = DivergedError(
                    f"rank {rank} waits in a collective that another one never enters: {value!r}"
                )
                raise self._diverged
            self._turn.wait()
        self._install(rank)
        return [box[at] for box in self._boxes]

    def _install(self, rank: int) -> None:
        for (module, name), value in self._modules[rank].items():
            setattr(module, name, value)

    def _keep(self, rank: int) -> None:
        for module, name in self._modules[rank]:
            self._modules[rank][module, name] = getattr(module, name)


def all_gather_object(into: list[Any], value: Any, group: Any = None) -> None:
    """Stand in for ``torch.distributed.all_gather_object`` between ranks of one process."""
    ranks, rank = group
    into[:] = ranks.exchange(rank, value)


def all_reduce(tensor: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> None:
    """Stand in for ``torch.distributed.all_reduce`` with a sum."""
    ranks, rank = group
    tensor.copy_(torch.stack(ranks.exchange(rank, tensor.clone())).sum(0))
