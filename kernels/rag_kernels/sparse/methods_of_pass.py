"""The methods of one pass over several requests, put together into one mask per layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rag_kernels.attention.base import AttentionCall
from rag_kernels.attention.mask import BlockMask, RequestBlocks
from rag_kernels.attention.plan import PositionCausalPlan
from rag_kernels.sparse.base import AttentionMethod


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Requests of a plan that name the same method and options."""

    method: AttentionMethod
    requests: tuple[int, ...]
    state: Any


class MethodsOfPass:
    """Asks each method once per layer, for its own requests only.

    Parameters
    ----------
    plan : PositionCausalPlan
        Of the pass.
    methods : sequence of AttentionMethod or None
        One for each request of the plan; None where rows read every key up to their own.
    """

    def __init__(self, plan: PositionCausalPlan, methods: Sequence[AttentionMethod | None]) -> None:
        if len(methods) != len(plan.slots):
            raise ValueError(
                f"{len(methods)} methods for {len(plan.slots)} requests; give one, or None, for each."
            )
        members: dict[str, tuple[AttentionMethod, list[int]]] = {}
        for request, method in enumerate(methods):
            if method is not None:
                members.setdefault(method.identity, (method, []))[1].append(request)
        self._groups = [
            _Group(method, tuple(requests), method.prepare(plan, tuple(requests)))
            for method, requests in members.values()
        ]

    def mask(self, layer: int, call: AttentionCall) -> BlockMask | None:
        """Return the mask of a layer's call, None where every row reads everything.

        Raises
        ------
        ValueError
            A method's mask does not fit the plan.
        """
        merged: list[RequestBlocks | None] = [None] * len(call.plan.slots)
        for group in self._groups:
            mask = group.method.mask(layer, call, group.state)
            if mask is None:
                continue
            mask.check(call.plan)
            for request in group.requests:
                merged[request] = mask.requests[request]
        return BlockMask(requests=tuple(merged)) if any(merged) else None
