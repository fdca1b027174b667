"""Thresholds of each head: halved until what is left out changes the head's output by little enough.

Shape suffixes: R rows, H query heads, N key/value heads, D head dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall
from rag_kernels.attention.call import position_causal_attention
from rag_kernels.attention.planning import plan_position_causal
from rag_kernels.sparse.sale.method import SaleAttention, SaleConfig
from rag_kernels.sparse.sale.thresholds import ThresholdTable

FIRST_TAU = 0.008
"""Where the paper's calibration begins: no head gets a larger threshold."""
SMALLEST_TAU = 1e-4
"""A head that needs one as small reads everything."""


class Calibration:
    """Thresholds that are no larger than any sample allows.

    For each head and sample: while the sum over rows and channels of ``|sparse - dense|`` is not below ``theta`` times
    the number of rows, the threshold is halved; at :data:`SMALLEST_TAU` it becomes 0. A later sample begins where the
    earlier ones ended, so a threshold never rises.

    Parameters
    ----------
    theta : float
        Error per row that a head is allowed; positive.
    config : SaleConfig
        Options that the thresholds are for; its own thresholds are not used.
    largest_tau : float
        Where every head begins; above :data:`SMALLEST_TAU`. One at which the error of most heads is small already says
        little of them: a larger one lets those read fewer keys, and holds the others to the same error.

    Raises
    ------
    ValueError
        A threshold to begin with at which every head would read everything.
    """

    def __init__(
        self, theta: float, config: SaleConfig | None = None, largest_tau: float = FIRST_TAU
    ) -> None:
        if not SMALLEST_TAU < largest_tau < math.inf:
            raise ValueError(
                f"the largest threshold is {largest_tau:g}; give a number above {SMALLEST_TAU:g}, such as {FIRST_TAU:g}"
            )
        self.theta = theta
        self.largest_tau = largest_tau
        self.config = config or SaleConfig()
        self._tau: dict[int, Tensor] = {}

    def add(self, layer: int, q_RHD: Tensor, k_RND: Tensor, v_RND: Tensor, scale: float) -> Tensor:
        """Lower the thresholds of a layer until they suit a prompt.

        Parameters
        ----------
        layer : int
            Index of the layer.
        q_RHD, k_RND, v_RND : Tensor
            Rotated queries and keys, and values, of all tokens of the prompt.
        scale : float
            Softmax scale.

        Returns
        -------
        Tensor
            fp32 ``[H]``: error per row of each head with its threshold.
        """
        rows, heads, _ = q_RHD.shape
        tau = self._tau.setdefault(
            layer, torch.full((heads,), self.largest_tau, dtype=torch.float64)
        )
        error = torch.zeros(heads)
        group = heads // k_RND.shape[1]
        open_heads = (tau > 0).nonzero().flatten()
        if not len(open_heads):
            return error
        # Each head with a copy of its keys: a kernel then reads what this head keeps, not what its group does.
        q, k, v = q_RHD.float(), k_RND.float(), v_RND.float()
        plan_heads, dense = -1, torch.empty(0)
        while len(open_heads):
            own = q[:, open_heads], k[:, open_heads // group], v[:, open_heads // group]
            if plan_heads != len(open_heads):
                plan_heads = len(open_heads)
                plan = plan_position_causal(
                    [torch.arange(rows)],
                    [torch.arange(rows, device=q.device)],
                    num_q_heads=plan_heads,
                    num_kv_heads=plan_heads,
                    head_dim=q.shape[2],
                )
                dense = position_causal_attention(*own, plan, scale)
            method = self._method(tau[open_heads])
            call = AttentionCall(q_RNH=own[0], k_pool=own[1], v_pool=own[2], plan=plan, scale=scale)
            mask = method.mask(0, call, method.prepare(plan, (0,)))
            if mask is None:
                error[open_heads] = 0
                break
            sparse = position_causal_attention(*own, plan, scale, mask=mask)
            found = ((sparse - dense).abs().sum(dim=(0, 2)) / rows).cpu()
            error[open_heads] = found
            open_heads = open_heads[found >= self.theta]
            halved = tau[open_heads] / 2
            tau[open_heads] = halved.masked_fill(halved <= SMALLEST_TAU, 0)
            error[tau == 0] = 0
            open_heads = open_heads[tau[open_heads] > 0]
        return error

    def table(self, model: str, fingerprint: str, tokens: Sequence[int]) -> ThresholdTable:
        """Put what was found into a table.

        Parameters
        ----------
        model, fingerprint : str
            What was calibrated.
        tokens : sequence of int
            Lengths of the samples.
        """
        return self._table(
            [self._tau[layer].tolist() for layer in range(len(self._tau))],
            model=model,
            fingerprint=fingerprint,
            tokens=tuple(tokens),
        )

    def _method(self, tau: Tensor) -> SaleAttention:
        table = self._table([tau.tolist()], model="", fingerprint="", tokens=())
        return SaleAttention(dataclasses.replace(self.config, thresholds="auto"), table)

    def _table(
        self, tau: list[list[float]], *, model: str, fingerprint: str, tokens: tuple[int, ...]
    ) -> ThresholdTable:
        config = self.config
        return ThresholdTable(
            model=model,
            fingerprint=fingerprint,
            theta=self.theta,
            tokens=tokens,
            block_q=config.block_q,
            block_k=config.block_k,
            local_window=config.local_window,
            segment=config.segment,
            granularity=config.granularity,
            tau=tuple(map(tuple, tau)),
        )
