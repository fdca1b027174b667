"""Chunk KV from the host to the device beside the forward: a stream of its own, an event per layer.

Layer ``l + 1`` is copied while layer ``l`` is computed (CachedAttention, https://arxiv.org/abs/2403.19708, section
3.2); here the last step of the way, from page-locked memory to the device. Its order was tested on the CPU's own
streams and events; it has not run on a GPU yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from chunk_cache import LayerKV


class Copied(NamedTuple):
    """Layers on their way to the device."""

    layers: list[LayerKV]
    """On the device; not to be read before :meth:`CopyStream.arrive`."""
    event: Any


class CopyStream:
    """Copies to a device, in the order in which they were asked for, beside what the device computes.

    Used by one thread. What is copied is held until its event has passed, whoever else lets go of it meanwhile: a lease
    may end when a forward was queued, and a slab gives a block away when its last tensor is gone
    (:class:`chunk_cache.store.slab.Slab`).

    Parameters
    ----------
    device : torch.device
        Where to.
    module : object, optional
        Streams and events: ``torch.cuda`` for a GPU, as :func:`torch.get_device_module` has it.
    """

    def __init__(self, device: torch.device, module: Any = None) -> None:
        self._device = device
        self._module = torch.get_device_module(device) if module is None else module
        self._stream = self._module.Stream()
        self._held: deque[tuple[Any, list[LayerKV]]] = deque()

    @property
    def num_held(self) -> int:
        """Copies whose sources are held."""
        self._let_go()
        return len(self._held)

    def copy(self, layers: Sequence[LayerKV]) -> Copied:
        """Begin to copy; never waits where the sources are page-locked.

        Parameters
        ----------
        layers : sequence of LayerKV
            On any device; must not change until the copy is over.
        """
        self._let_go()
        with self._module.stream(self._stream):
            there = [
                LayerKV(*(part.to(self._device, non_blocking=True) for part in layer))
                for layer in layers
            ]
            event = self._module.Event()
            event.record(self._stream)
        self._held.append((event, list(layers)))
        return Copied(there, event)

    def arrive(self, copied: Copied) -> list[LayerKV]:
        """Let what is queued on the current stream from now on wait for a copy; the host does not wait."""
        current = self._module.current_stream()
        current.wait_event(copied.event)
        if self._device.type == "cuda":
            for layer in copied.layers:
                for part in layer:
                    # Its memory is the copy stream's: it must not be given to a later copy while this stream reads it.
                    part.record_stream(current)
        return copied.layers

    def _let_go(self) -> None:
        while self._held and self._held[0][0].query():
            self._held.popleft()
