"""Asymmetric rounding of groups of values to evenly spaced levels between the smallest and the largest of each."""

from __future__ import annotations

import torch
from torch import Tensor


def group_ranges(x: Tensor, dim: int) -> Tensor:
    """Smallest and largest value of each group.

    Parameters
    ----------
    x : Tensor
        Values; `dim` runs within the groups.
    dim : int
        Counted from the end, negative.

    Returns
    -------
    Tensor
        ``[2, ...]`` of the dtype of `x`, without `dim`.
    """
    return torch.stack((x.amin(dim), x.amax(dim)))


def round_to_levels(x: Tensor, ranges: Tensor, num_steps: int) -> Tensor:
    """Number, ``0 .. num_steps``, of the level that decodes nearest to each value.

    Of the two levels around a value the one is taken whose *decoded* value, rounded to the dtype, is nearer. So what
    was decoded once is met exactly, also where the dtype is coarser than the levels are.

    Parameters
    ----------
    x : Tensor
        Values, all finite.
    ranges : Tensor
        ``[2, ...]`` smallest and largest value of the group that each value is in; broadcasts with `x`.
    num_steps : int
        Distances between neighbouring levels, at most 255.

    Returns
    -------
    Tensor
        uint8, of the shape of `x`.
    """
    low, high = ranges.float()
    exact = x.float()
    # A group of equal values has no width: all of it is level 0.
    width = torch.where(high > low, high - low, 1)
    below = ((exact - low) / width * num_steps).floor_().clamp_(0, num_steps)
    above = (below + 1).clamp_(max=num_steps)
    error_below = (levels_to_values(below, ranges, num_steps).float() - exact).abs_()
    error_above = (levels_to_values(above, ranges, num_steps).float() - exact).abs_()
    return torch.where(error_above < error_below, above, below).to(torch.uint8)


def levels_to_values(levels: Tensor, ranges: Tensor, num_steps: int) -> Tensor:
    """Return values of the dtype of `ranges`; the first and the last level are its ends exactly.

    An error is at most half a step, ``(high - low) / num_steps / 2``, plus the rounding to the dtype.
    """
    low, high = ranges.float()
    # `lerp` meets both ends without rounding. The smallest and the largest value of a group thus
    # come back as they were, and a second encoding finds the same range.
    return torch.lerp(low, high, levels.float() / num_steps).to(ranges.dtype)
