"""Layers that need more tokens get more: budgets per layer whose sum is exact."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite


def layer_budgets(
    sensitivity: Sequence[float], budget: int, *, alpha: float = 1.1, floor: float = 0.25
) -> tuple[int, ...]:
    """Tokens of each layer, by how far its keys change when the context is cut (EpiCache, arXiv 2509.17396).

    Layer ``l`` gets the weight ``(1 - n_l) ** alpha``, ``n_l`` its sensitivity scaled to 0..1 over layers, and a share of
    the total in proportion; none gets less than ``floor * budget``.

    Deviation: the released code applies the floor to the shares at the end, so that their sum exceeds the total. Here
    the total is *water-filled*: layers below the floor are lifted to it, and the others share what is left.

    Parameters
    ----------
    sensitivity : sequence of float
        Per layer, the cosine between its keys with the full context and with a cut one: 1 where nothing changes.
    budget : int
        Mean tokens per layer, 1 or more.
    alpha : float
        0 makes all alike. The paper takes 1.1 for Llama and 1.3 for Qwen.
    floor : float
        Least share of ``budget`` that a layer gets, 0 to 1.

    Returns
    -------
    tuple of int
        Whose sum is ``budget * len(sensitivity)``, none below ``floor * budget`` rounded down.

    Raises
    ------
    ValueError
        One line: no layer, or a number that is not allowed.
    """
    layers = len(sensitivity)
    if not layers or not all(map(isfinite, sensitivity)):
        raise ValueError("sensitivity must hold one finite number per layer, at least one.")
    if budget < 1:
        raise ValueError(f"budget is {budget} tokens; it must be 1 or more.")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha is {alpha}; it must be 0 or more.")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is {floor}; it must be between 0 and 1.")
    low, high = min(sensitivity), max(sensitivity)
    if low == high or alpha == 0:
        return (budget,) * layers
    weights = [(1 - (value - low) / (high - low)) ** alpha for value in sensitivity]
    total, least = budget * layers, int(floor * budget)
    return _rounded(_filled(weights, total, least), total)


def _filled(weights: Sequence[float], total: int, least: int) -> list[float]:
    """Shares in proportion to weights, none below ``least``, of exactly ``total``."""
    floored: set[int] = set()
    while True:
        free = [i for i in range(len(weights)) if i not in floored]
        left = total - least * len(floored)
        scale = left / sum(weights[i] for i in free)  # the largest weight is 1 and never floored
        below = {i for i in free if weights[i] * scale < least}
        if not below:
            return [least if i in floored else weights[i] * scale for i in range(len(weights))]
        floored |= below


def _rounded(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers of the same sum: the largest remainders are rounded up, of equal ones the earlier layer's."""
    whole = [int(share + 1e-9) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return tuple(whole)
