"""The contract of a signal, and what an engine offers it: requests, passes of the model, tensors of all ranks.

A *signal* is what a policy learns of a prompt from the model before it chooses rows: a :class:`Signal` decides which
rows pass through the model, its :class:`PassObserver` looks at them, and what was seen is handed to the policy of
each request. The engine implements :class:`ProbePasses` and :class:`ProbedRequest`, so a signal names no engine.

Under tensor parallelism every rank holds its own heads, and all ranks must choose the same rows. What an observer saw
is therefore combined by :meth:`ProbePasses.mean` or :meth:`ProbePasses.total` before anything is decided by it, and
every method of :class:`ProbePasses` is called on all ranks in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from chunk_cache.policies.layout import ReuseLayout
from rag_kernels import LogitRules

if TYPE_CHECKING:
    from chunk_cache.policies.scored import ScoredPolicy


class PassRows(Protocol):
    """Rows of one request in a pass, made by a :class:`ProbedRequest`."""

    @property
    def positions(self) -> Tensor:
        """int64 ``[R]`` on the host, rising: absolute positions of the rows."""
        ...

    @property
    def kv_slots(self) -> Tensor:
        """int64 ``[kv_len]`` on the device; slot ``j`` of the paged pool holds position ``j``."""
        ...

    @property
    def row_slots(self) -> Tensor:
        """int64 ``[R]`` on the device: where the rows' own keys and values go."""
        ...

    @property
    def count(self) -> int:
        """Number of rows ``R``."""
        ...


class ProbedRequest(Protocol):
    """A request whose policy waits for its signal."""

    @property
    def policy(self) -> ScoredPolicy:
        """The policy that named the signal."""
        ...

    @property
    def layout(self) -> ReuseLayout:
        """What the policy sees of the request."""
        ...

    @property
    def prompt(self) -> Tensor:
        """int64 ``[N]`` on the host: token ids."""
        ...

    @property
    def fresh(self) -> Tensor:
        """int64 on the host, rising: positions that are computed in any case."""
        ...

    @property
    def candidates(self) -> Tensor:
        """int64 ``[num_reused]`` on the host, rising: the reused positions of the layout."""
        ...

    @property
    def kv_slots(self) -> Tensor:
        """int64 ``[kv_len]`` on the device; slot ``j`` of the paged pool holds position ``j``."""
        ...

    @property
    def chunk_spans(self) -> Sequence[tuple[int, int]]:
        """Position ranges of the prompt's chunks, half-open, those that are exact included."""
        ...

    def with_fresh(self, reused: Tensor) -> Tensor:
        """Positions to compute for these reused ones to be as in a whole prompt; int64, rising."""
        ...

    def rows(self, positions: Tensor) -> PassRows:
        """Rows of the prompt at rising positions."""
        ...

    def rows_behind(self, ids: Sequence[int], slots: Tensor) -> PassRows:
        """Rows of tokens that stand behind the prompt, their KV in :meth:`ProbePasses.scratch` slots."""
        ...


class PassObserver(ABC):
    """Looks at the layers of one pass; must write neither the pool nor what it is shown."""

    @property
    @abstractmethod
    def last_layer(self) -> int | None:
        """Layer behind which the pass ends, before its attention; None lets it go on to the logits."""

    def before_write(  # noqa: B027 - an observer may need one of the two looks only
        self, layer_id: int, k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Look at a layer's pool ``[slots, N, H]`` as loaded, and at the new K and V ``[R, N, H]`` of all rows."""

    def after_write(self, layer_id: int, q: Tensor, k_pool: Tensor) -> None:  # noqa: B027
        """Look at the rotated queries ``[R, Hq, H]`` when the new rows are in the pool."""


class ProbePasses(Protocol):
    """Passes of the model over chosen rows, within one forward."""

    @property
    def scaling(self) -> float:
        """Factor of the attention's scores."""
        ...

    def rules(self, layer_id: int) -> LogitRules:
        """What a layer does with its scores beside causality."""
        ...

    def run(self, rows: Sequence[PassRows], observer: PassObserver) -> Tensor | None:
        """Run a pass over rows of some requests, and charge each request the row-layers of it.

        The rows' new KV is written to their slots; later passes find it there, and attend to it.

        Parameters
        ----------
        rows : sequence of PassRows
            At most one per request, in the order of the requests.
        observer : PassObserver
            Looks at it, and says where it ends.

        Returns
        -------
        Tensor or None
            int64 ``[len(rows)]`` on the device: the likeliest next token behind each request's rows, the same on all
            ranks; None where the observer ended the pass.

        Raises
        ------
        Exception
            Whatever failed, on every rank. A signal lets it pass: the batch is then prefilled as usual.
        """
        ...

    def mean(self, tensor: Tensor) -> Tensor:
        """Average over the ranks, the same bits on each."""
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on each."""
        ...

    def scratch(self, requests: Sequence[ProbedRequest], tokens: int) -> Tensor | None:
        """Slots for so many tokens behind each prompt, for the time of this forward.

        Returns
        -------
        Tensor or None
            int64 ``[len(requests), tokens]``; None where any rank has not so many, or a prompt would outgrow the
            model's context.
        """
        ...

    def count(self, family: str, kind: str, amount: int) -> None:
        """Add to a counter that the engine publishes."""
        ...


class Signal(ABC):
    """What a policy asks of the model before it chooses, with the passes that answer it and their cost.

    Implementations are frozen dataclasses: requests of a batch whose policies name *equal* signals are probed
    together, in the same passes. Signals are run in the order of their names, so that the passes of a batch do not
    depend on the order of its requests.
    """

    name: ClassVar[str]

    @abstractmethod
    def choose(self, passes: ProbePasses, requests: Sequence[ProbedRequest]) -> list[Tensor]:
        """Run the passes and let the policy of each request choose by what they showed.

        Parameters
        ----------
        passes : ProbePasses
            Of this forward.
        requests : sequence of ProbedRequest
            At least one; the policy of each has named a signal that equals this one, and needs it.

        Returns
        -------
        list of Tensor
            By request, int64, rising: the reused positions to compute, as :meth:`ScoredPolicy.choose` returned them.
        """

    @abstractmethod
    def cost(self, layout: ReuseLayout, kept: Sequence[int]) -> float:
        """Row-layers of the passes for one request, which its policy takes out of the budget beforehand.

        Parameters
        ----------
        layout : ReuseLayout
            The request.
        kept : sequence of int
            Reused tokens left after each stage of the choice.
        """
