"""The contract of an attention kernel: how position-causal attention is computed on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rag_kernels.attention.mask import BlockMask
from rag_kernels.attention.plan import PositionCausalPlan


class LogitRules(NamedTuple):
    """What a layer does with its logits beside causality; nothing by default.

    Attributes
    ----------
    sliding_window : int or None
        Keys that a row sees, its own counted; None for all.
    logit_cap : float or None
        Logits become ``cap * tanh(logit / cap)``; None for no cap.
    """

    sliding_window: int | None = None
    logit_cap: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionCall:
    """Everything that one attention call of one layer is given; fields as :func:`rag_kernels.position_causal_attention`.

    Attributes
    ----------
    q_RNH : Tensor
        ``[R, Hq, D]`` rotated queries, in the order of the plan's positions.
    k_pool, v_pool : Tensor
        ``[num_slots, Hk, D]``.
    plan : PositionCausalPlan
        Rows and slots.
    scale : float
        Softmax scale.
    sliding_window : int, optional
        Keys that a row sees, its own counted.
    logit_cap : float, optional
        Logits become ``cap * tanh(logit / cap)``.
    mask : BlockMask, optional
        Blocks of keys that rows may read; None for all.
    sinks : Tensor, optional
        ``[Hq]``: logit per query head of a key without a value that every row reads too.
    """

    q_RNH: Tensor
    k_pool: Tensor
    v_pool: Tensor
    plan: PositionCausalPlan
    scale: float
    sliding_window: int | None = None
    logit_cap: float | None = None
    mask: BlockMask | None = None
    sinks: Tensor | None = None

    @property
    def sorted_q(self) -> Tensor:
        """The queries in the order of the plan's blocks."""
        order = self.plan.order
        return self.q_RNH if order is None else self.q_RNH.index_select(0, order)

    def unsorted(self, out: Tensor) -> Tensor:
        """Bring rows that are in the order of the plan's blocks back into that of the queries."""
        inverse = self.plan.inverse
        return out if inverse is None else out.index_select(0, inverse)


class KernelUnavailableError(RuntimeError):
    """A kernel cannot compute a call after all; it refuses the calls of this plan, and another one computes them.

    ``is_final``: it refuses every call from now on.
    """

    def __init__(self, message: str, *, is_final: bool = True) -> None:
        super().__init__(message)
        self.is_final = is_final


class AttentionKernel(ABC):
    """Computes :func:`rag_kernels.position_causal_attention` on some devices.

    A kernel has no state of a request: what it derives from a plan it keeps in the plan's ``memo``. It writes
    neither queries nor pools. *Which* keys a row reads is for the plan and the mask to say, never for a kernel.

    Attributes
    ----------
    name : str
        As settings and messages call it.
    block_rows : int
        Most rows of a block unless the caller of the plan says otherwise.
    reads_masks : bool
        Whether it honours a block mask; a call with one goes to another kernel otherwise.
    reads_sinks : bool
        The same of sinks.
    """

    name: ClassVar[str]
    block_rows: ClassVar[int] = 128
    reads_masks: ClassVar[bool] = False
    reads_sinks: ClassVar[bool] = False

    @abstractmethod
    def refuse_device(self, device: torch.device) -> str | None:
        """Reason why no plan for this device may name this kernel; None where it runs there."""

    def is_default_on(self, device: torch.device) -> bool:
        """Whether ``auto`` may choose it there; the first kernel of the registry that may is taken."""
        return self.refuse_device(device) is None

    def refuse(self, call: AttentionCall) -> str | None:
        """Reason why another kernel must compute this call; None where this one does."""
        if call.mask is not None and not self.reads_masks:
            return "reads no block mask"
        if call.sinks is not None and not self.reads_sinks:
            return "reads no attention sinks"
        return None

    def prepare(self, call: AttentionCall) -> None:  # noqa: B027 - most kernels have nothing to plan
        """Do what can be done before the first layer of a pass, for calls like this one; it may raise as :meth:`attend`.

        Of the queries and the pools only shapes, types and devices are looked at: they need not hold anything yet.
        """

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """Compute a call that was not refused; its tensors are left as they are.

        Returns
        -------
        Tensor
            ``[R, Hq, D]`` in the type of the queries, rows in their order.

        Raises
        ------
        KernelUnavailableError
            It cannot compute this, which only the attempt showed; nothing was written.
        """
