"""The contract of an attention method: which keys the rows of a prompt read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from rag_kernels.attention.base import AttentionCall, LogitRules
from rag_kernels.attention.mask import BlockMask
from rag_kernels.attention.plan import PositionCausalPlan


class AttentionMethod(ABC):
    """Says which blocks of keys each block of query rows reads; how that is computed is a kernel's business.

    It acts on the prefill of the requests that name it, fused or not. Decoding stays dense unless the method acts on
    it, too. What is computed behind a request's exact prefix is approximate then: its caller publishes and stores none
    of it as exact.

    A prompt may come in several pieces, in one pass each, and one pass may hold requests of several methods. So a
    method keeps nothing between passes: one instance serves all requests that name the same options. It writes neither
    queries nor pools. All ranks of a tensor-parallel group call it, each with its own heads.

    Attributes
    ----------
    name : str
        As requests and messages call it: the name in the paper.
    config_type : type
        Frozen dataclass of the options; clients set its fields by name.
    acts_on_decode : bool
        Decoded tokens read the blocks of :meth:`decode_blocks`, where the attention backend can gather them.
    weighs_logits : bool
        It chooses by logits as they are, so it is of no use for a model that makes others of them by a cap.
    config : object
        Options of this instance.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[Any]]
    acts_on_decode: ClassVar[bool] = False
    weighs_logits: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        """Make the method with its options, whose types were checked."""
        self.config = config

    @property
    def identity(self) -> str:
        """Name and every option: methods with the same identity read the same keys."""
        return f"{self.name} {self.config!r}"

    @property
    def prefix_unit(self) -> int:
        """Tokens of a unit: rows in front of a multiple of it read the same keys whatever follows, and in any pieces.

        So what they were computed to is right for every prompt that begins alike, as long as prefixes and pieces end
        at multiples. 0 where rows depend on what stands behind them: nothing is kept for others then.
        """
        return 0

    def for_model(self, fingerprint: str) -> AttentionMethod:
        """Return the method for the weights that an engine has loaded; by default itself.

        Parameters
        ----------
        fingerprint : str
            Of the checkpoint; empty where the weights are no longer those of one.

        Raises
        ------
        ValueError
            The options do not fit these weights; one line.
        """
        return self

    def refuse_layers(self, rules: Sequence[LogitRules]) -> str | None:
        """Reason why the method is of no use for a model whose layers have these windows and caps, or None.

        It is never asked for the blocks of a layer with a sliding window: rows read everything within it.
        """
        cap = next((one.logit_cap for one in rules if one.logit_cap), None)
        if self.weighs_logits and cap is not None:
            return f"it weighs keys by their logits, which the model caps at {cap:g}"
        if all(one.sliding_window is not None for one in rules):
            return "every layer has a sliding window, within which everything is read"
        return None

    def prepare(self, plan: PositionCausalPlan, requests: Sequence[int]) -> Any:
        """Do once per pass what all layers share.

        Parameters
        ----------
        plan : PositionCausalPlan
            Rows and slots of the pass.
        requests : sequence of int
            Those of the plan that asked for this method; the others are none of its business.

        Returns
        -------
        object
            State of the pass, handed to :meth:`mask` with every layer. By default the requests themselves.
        """
        return requests

    @abstractmethod
    def mask(self, layer: int, call: AttentionCall, state: Any) -> BlockMask | None:
        """Blocks that rows read in one layer.

        Parameters
        ----------
        layer : int
            Index of the layer.
        call : AttentionCall
            Queries, pools and softmax scale of the layer, keys of the rows already in the pool; without a mask.
        state : object
            From :meth:`prepare`.

        Returns
        -------
        BlockMask or None
            With an entry for each of the method's requests, None for those that read every key. None alone where the
            layer is dense for all of them.
        """

    def reads_all(self, layer: int) -> bool:
        """Whether every row reads every key in a layer, decoded tokens too; False where that is not known before."""
        return False

    def decode_blocks(self, position: int) -> Tensor:
        """Blocks of keys that a decoded token reads, in all layers but those that read all.

        Asked only of methods that act on decoding, once per token, before layer 0: the blocks follow from the
        position. They are cut by absolute position into ``config.block`` tokens.

        Parameters
        ----------
        position : int
            Of the token, 0 the first of the prompt.

        Returns
        -------
        Tensor
            int64 ``[n]`` on the host, rising, up to the block that holds the position, which is one of them.
        """
        raise NotImplementedError(f"attention method {self.name!r} does not act on decoding")
