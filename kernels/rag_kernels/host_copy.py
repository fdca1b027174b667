"""Copies between host and device: to the device without a wait, to the host with one wait for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device; the host does not wait for what the device was given before.

    Parameters
    ----------
    tensor : Tensor
        On the host it is copied by way of page-locked memory, which torch holds until the device has read it. On the
        device it is taken as it is.
    device : torch.device
        Where to.
    dtype : torch.dtype, optional
        Of the copy; converted on the side where the tensor is.
    """
    tensor = tensor if dtype is None else tensor.to(dtype)
    if device.type != "cuda" or tensor.device.type != "cpu" or not tensor.numel():
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the host, each of its shape and type, with one wait for all that are on the device.

    Parameters
    ----------
    tensors : sequence of Tensor
        Those on a device must be on one; integers of at most 53 bits where types differ.
    """
    there = [one for one in tensors if one.device.type != "cpu"]
    if not there:
        return list(tensors)
    dtypes = {one.dtype for one in there}
    joint = (
        dtypes.pop() if len(dtypes) == 1 else torch.float64
    )  # which holds fp32 and such integers as they are
    parts = iter(
        torch.cat([one.flatten().to(joint) for one in there])
        .to("cpu")
        .split([one.numel() for one in there])
    )
    return [
        one if one.device.type == "cpu" else next(parts).view(one.shape).to(one.dtype)
        for one in tensors
    ]
