"""Tensors that say they are on a GPU and are computed on the host, and a list of what would make the host wait.

torch's own dispatcher decides what is called; here every call is looked at before it runs. What would wait on a real
GPU, or copy from memory that is not page-locked (which waits, too), is noted with the line of the project that asked.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

GPU = torch.device("cuda", 0)
_ROOT = Path(__file__).parents[2]
_ALWAYS = {
    "_local_scalar_dense": "a number is read",
    "nonzero": "sizes follow from values",
    "masked_select": "sizes follow from values",
    "_unique": "sizes follow from values",
    "_unique2": "sizes follow from values",
    "unique_dim": "sizes follow from values",
    "unique_consecutive": "sizes follow from values",
    "bincount": "sizes follow from values",
    "equal": "a number is read",
    "is_nonzero": "a number is read",
}


class GpuTensor(Tensor):
    """A host tensor that says it is on :data:`GPU`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self) -> list[Any]:
        """torch refuses it for classes of others."""
        found: list[Any] = self.to("cpu").tolist()
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a pretended GPU, outside of pretend_gpu()")


class PretendedGpu(TorchDispatchMode):
    """Runs everything on the host.

    Attributes
    ----------
    waits : list of str
        What would have made the host wait: what for, and where.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: dict[int, Tensor] = {}

    def put(self, tensor: Tensor) -> Tensor:
        """Put a host tensor on the GPU; not counted."""
        return GpuTensor(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        flat = tree_flatten((args, kwargs))[0]
        on_gpu = any(isinstance(one, GpuTensor) for one in flat)
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        device = kwargs.get("device")
        wants_gpu = device is not None and torch.device(device).type == "cuda"
        wants_host = device is not None and torch.device(device).type == "cpu"
        if kwargs.pop("pin_memory", False) and not wants_gpu:
            return self._pin(func(*args, **kwargs))
        self._look(name, args, kwargs, flat, wants_gpu=wants_gpu, wants_host=wants_host)
        if not on_gpu and not wants_gpu:
            return func(*args, **kwargs)
        if wants_gpu:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map_only(GpuTensor, lambda one: one.inner, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        stays = isinstance(args[0], GpuTensor) if name == "copy_" else not wants_host
        if not stays:
            return out
        if name == "_to_copy" and wants_gpu and not on_gpu and out is inner_args[0]:
            out = out.clone()
        # A call in place gives its target back.
        target = next(
            (one for one in flat if isinstance(one, GpuTensor) and one.inner is out), None
        )
        return target if target is not None else tree_map_only(Tensor, GpuTensor, out)

    def _look(
        self,
        name: str,
        args: Any,
        kwargs: Any,
        flat: list[Any],
        *,
        wants_gpu: bool,
        wants_host: bool,
    ) -> None:
        on_gpu = any(isinstance(one, GpuTensor) for one in flat)
        if on_gpu and name in _ALWAYS:
            self._note(_ALWAYS[name])
        elif (on_gpu and name == "isin" and not kwargs.get("assume_unique")) or (
            on_gpu and name == "repeat_interleave" and kwargs.get("output_size") is None
        ):
            self._note("sizes follow from values")
        elif on_gpu and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [at for at in args[1] if at is not None]
            is_mask = name != "index" and len(masks) == 1 and masks[0].dtype == torch.bool
            if is_mask and args[2].numel() == 1:
                return  # torch makes it a masked_fill
            for at in args[1]:
                if at is not None and at.dtype in (torch.bool, torch.uint8):
                    self._note("a mask as an index")
                elif at is not None and not isinstance(at, GpuTensor):
                    self._copied(at, False)
            if len(args) > 2 and not isinstance(args[2], GpuTensor):
                self._copied(args[2], False)
        elif name == "_to_copy":
            source, fast = args[0], bool(kwargs.get("non_blocking"))
            if isinstance(source, GpuTensor) and wants_host:
                self._note("a copy to the host")
            elif not isinstance(source, GpuTensor) and wants_gpu:
                self._copied(source, fast)
        elif name == "copy_":
            target, source = args[0], args[1]
            fast = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            if isinstance(target, GpuTensor) and not isinstance(source, GpuTensor):
                self._copied(source, fast)
            elif isinstance(source, GpuTensor) and not (
                isinstance(target, GpuTensor) or (fast and self._is_pinned(target))
            ):
                self._note("a copy to the host")

    def _copied(self, source: Tensor, fast: bool) -> None:
        if source.numel() and not (fast and self._is_pinned(source)):
            self._note("a copy from memory that is not page-locked")

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage()._cdata] = (
            tensor  # held, so that no other takes its place
        )
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, GpuTensor) and tensor.untyped_storage()._cdata in self._pinned

    def _note(self, why: str) -> None:
        own = [
            frame
            for frame in traceback.extract_stack()
            if Path(frame.filename).is_relative_to(_ROOT)
            and "site-packages" not in frame.filename
            and frame.filename != __file__
        ]
        at = (
            f"{Path(own[-1].filename).relative_to(_ROOT)}:{own[-1].lineno} {own[-1].line}"
            if own
            else "?"
        )
        self.waits.append(f"{at}: {why}")


@contextlib.contextmanager
def pretend_gpu() -> Iterator[PretendedGpu]:
    """Have a GPU, as far as tensors and copies go."""
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    # torch would start its driver before it asks the dispatcher.
    with mock.patch.object(torch.cuda, "_lazy_init"), PretendedGpu() as gpu:
        # torch.tensor(..., device=) copies where no dispatcher sees it, unless it is told not to.
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
