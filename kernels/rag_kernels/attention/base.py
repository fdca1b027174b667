"""The contract of an attention kernel: how position-causal attention is computed on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from rag_kernels.attention.plan import PositionCausalPlan


class AttentionKernel(ABC):
    """Computes :func:`rag_kernels.position_causal_attention` on some devices.

    A kernel has no state of a request: what it derives from a plan it keeps in the plan's ``memo``. It writes
    neither queries nor pools. *Which* keys a row reads is the plan's business, never a kernel's.

    Attributes
    ----------
    name : str
        As settings and messages call it.
    block_rows : int
        Most rows of a block unless the caller of the plan says otherwise.
    """

    name: ClassVar[str]
    block_rows: ClassVar[int] = 128

    @abstractmethod
    def refuse_device(self, device: torch.device) -> str | None:
        """Reason why no plan for this device may name this kernel; None where it runs there."""

    def is_default_on(self, device: torch.device) -> bool:
        """Whether ``auto`` may choose it there; the first kernel of the registry that may is taken."""
        return self.refuse_device(device) is None

    def refuse(
        self,
        plan: PositionCausalPlan,
        dtype: torch.dtype,
        pool_dtype: torch.dtype,
        *,
        sliding_window: int | None,
        logit_cap: float | None,
    ) -> str | None:
        """Reason why another kernel must compute this call; None where this one does.

        Parameters
        ----------
        plan : PositionCausalPlan
            Of the call.
        dtype, pool_dtype : torch.dtype
            Of the queries, and of keys and values.
        sliding_window, logit_cap : optional
            As for :func:`rag_kernels.position_causal_attention`.
        """
        return None

    @abstractmethod
    def attend(
        self,
        q_RNH: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        plan: PositionCausalPlan,
        scale: float,
        sliding_window: int | None,
        logit_cap: float | None,
    ) -> Tensor:
        """Compute a call that was not refused; arguments as for the public function.

        Parameters
        ----------
        q_RNH : Tensor
            ``[R, Hq, D]`` rotated queries, in the order of the plan's positions; left as they are.
        k_pool, v_pool : Tensor
            ``[num_slots, Hk, D]``; left as they are.
        plan : PositionCausalPlan
            Rows and slots.
        scale : float
            Softmax scale.
        sliding_window, logit_cap : optional
            As for the public function.

        Returns
        -------
        Tensor
            ``[R, Hq, D]`` in the type of the queries.
        """
