"""Closed-form refit of a layer's output projection, on the inputs that the converted model itself gives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SOLVABLE = 1e-6
"""Least ridge, relative to the inputs' energy: above what fp32 products are off."""


@dataclass(kw_only=True, slots=True)
class Ridge:
    """Ridge regression towards a known matrix; fed by :meth:`add`, answered by :meth:`solve`.

    Parameters
    ----------
    inputs : Tensor
        ``(N, N)`` fp64: sums of products of inputs.
    targets : Tensor
        ``(N, D)`` fp64: sums of products of inputs and targets.
    """

    inputs: Tensor
    targets: Tensor

    @classmethod
    def empty(cls, inputs: int, outputs: int) -> Ridge:
        """Nothing seen yet."""
        return cls(
            inputs=torch.zeros(inputs, inputs, dtype=torch.float64),
            targets=torch.zeros(inputs, outputs, dtype=torch.float64),
        )

    def add(self, x_TN: Tensor, y_TD: Tensor) -> None:
        """Count rows of inputs and of what they should become."""
        self.inputs += (x_TN.T @ x_TN).double()
        self.targets += (x_TN.T @ y_TD).double()

    def solve(self, known_DN: Tensor, ridge: float) -> Tensor:
        """Matrix of least squared error and distance from the known one.

        Parameters
        ----------
        known_DN : Tensor
            What it is held to.
        ridge : float
            How strongly, relative to the mean energy of an input.

        Returns
        -------
        Tensor
            ``(D, N)``, of the known matrix's type.
        """
        energy = float(self.inputs.diagonal().mean())
        if energy <= 0:
            return known_DN
        hold = max(ridge, _SOLVABLE) * energy
        left = self.inputs + hold * torch.eye(len(self.inputs), dtype=torch.float64)
        solved = torch.linalg.solve(left, self.targets + hold * known_DN.T.double())
        return solved.T.to(known_DN.dtype).contiguous()
