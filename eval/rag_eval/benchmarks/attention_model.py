"""A model in torch whose prefill reads by an attention method, computed by this project's kernels; no engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rag_eval.errors import EvalError
from rag_kernels import AttentionMethod, plan_position_causal, position_causal_attention
from rag_kernels.attention.base import AttentionCall
from rag_kernels.attention.mask import BlockMask, RequestBlocks
from rag_kernels.attention.plan import PositionCausalPlan
from rag_kernels.sparse.methods_of_pass import MethodsOfPass

_NAME = "rag_eval_method"
_LOGIT_ROWS = 128
"""Rows whose logits are held at once."""

SeeLayer = Callable[[int, AttentionCall], object]
"""``see(layer, call)``: what a layer's attention is given, before it is computed."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Spent:
    """What prefills cost.

    Attributes
    ----------
    prefill_s, attention_s, mask_s : float
        CPU time of this process: of all, of attention with finding the keys, of finding them.
    read, seen : float
        Pairs of a row and a key that were read, and that causality allows, the mean over the heads.
    """

    prefill_s: float = 0.0
    attention_s: float = 0.0
    mask_s: float = 0.0
    read: float = 0.0
    seen: float = 0.0

    @property
    def density(self) -> float:
        """Share of the keys that were read; 1 where nothing was prefilled."""
        return self.read / self.seen if self.seen else 1.0


class MethodModel:
    """A causal language model; one prompt at a time.

    Prefill reads the keys that the method of :meth:`prefill` keeps. What follows the prompt reads every key, as an engine's
    decoding does for methods that choose by the prompt.

    Parameters
    ----------
    folder : Path
        In Hugging Face format.

    Raises
    ------
    EvalError
        The model caps its logits or has a window, when it is run.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(_NAME, self._attend)
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", attn_implementation=_NAME
        ).eval()
        self._method: AttentionMethod | None = None
        self._passes: MethodsOfPass | None = None
        self._plan: PositionCausalPlan | None = None
        self._see: SeeLayer | None = None
        self._spent = Spent()
        self._is_counted = False

    def take_spent(self) -> Spent:
        """What :meth:`prefill` cost since this was last asked for."""
        spent, self._spent = self._spent, Spent()
        return spent

    def prefill(
        self,
        ids: Sequence[int],
        method: AttentionMethod | None = None,
        see: SeeLayer | None = None,
    ) -> tuple[Tensor, Any]:
        """Compute a prompt.

        Parameters
        ----------
        ids : sequence of int
            The prompt.
        method : AttentionMethod, optional
            Which keys rows read; every key by default.
        see : SeeLayer, optional
            Called per layer.

        Returns
        -------
        tuple
            Hidden states ``[R, E]`` in front of the vocabulary, and the cache for :meth:`ask`.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        self._is_counted, began = True, time.process_time()
        hidden = self._pass(ids, method, cache, see)
        self._spent.prefill_s += time.process_time() - began
        self._is_counted = False
        return hidden, cache

    def losses(self, hidden: Tensor, following: Sequence[int]) -> Tensor:
        """Negative log-likelihood of a token behind each row; fp64 ``[R]``."""
        wanted = torch.tensor(list(following))
        made = []
        for lo in range(0, len(wanted), _LOGIT_ROWS):
            logits = self._logits(hidden[lo : lo + _LOGIT_ROWS])
            made.append(
                torch.nn.functional.cross_entropy(
                    logits, wanted[lo : lo + _LOGIT_ROWS], reduction="none"
                )
            )
        return torch.cat(made).double()

    def ask(
        self,
        question: Sequence[int],
        answer: Sequence[int],
        cache: Any,
        method: AttentionMethod | None = None,
    ) -> tuple[bool, float]:
        """Prefill a question behind a prompt, and lay an answer behind it that reads every key.

        Parameters
        ----------
        question, answer : sequence of int
            Tokens.
        cache : object
            From :meth:`prefill`; left as it was.
        method : AttentionMethod, optional
            Which keys the rows of the question read.

        Returns
        -------
        tuple
            Whether greedy decoding would say just this, and the answer's loss per token.
        """
        rows = self._pass(question, method, cache)[-1:]
        if len(answer) > 1:
            rows = torch.cat((rows, self._pass(answer[:-1], None, cache)))
        cache.crop(-(len(question) + max(0, len(answer) - 1)))  # tokens to take off again
        logits = self._logits(rows)
        wanted = torch.tensor(list(answer))
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        return bool((logits.argmax(dim=1) == wanted).all()), float(loss)

    def _pass(
        self,
        ids: Sequence[int],
        method: AttentionMethod | None,
        cache: Any,
        see: SeeLayer | None = None,
    ) -> Tensor:
        """Hidden states of one forward pass; its keys are in the cache then."""
        self._plan = self._passes = None
        self._method, self._see = method, see
        with torch.inference_mode():
            found = self._model.model(
                torch.tensor([list(ids)]), past_key_values=cache, use_cache=True
            )
        hidden: Tensor = found.last_hidden_state[0]
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self._model.lm_head(hidden).float()
        return logits

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        if more.get("softcap") or more.get("sliding_window"):
            raise EvalError(
                "the model caps its logits or has a window; methods are not compared there"
            )
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        rows, keys = q.shape[0], k.shape[0]
        if self._plan is None:
            self._plan = plan_position_causal(
                [torch.arange(keys - rows, keys)],
                [torch.arange(keys)],
                num_q_heads=q.shape[1],
                num_kv_heads=k.shape[1],
                head_dim=q.shape[2],
            )
            self._passes = MethodsOfPass(self._plan, [self._method])
        assert self._passes is not None
        given = more.get("scaling")
        scale = float(given if given is not None else q.shape[2] ** -0.5)
        call = AttentionCall(q_RNH=q, k_pool=k, v_pool=v, plan=self._plan, scale=scale)
        layer = module.layer_idx
        if self._see is not None:
            self._see(layer, call)
        began = time.process_time()
        kept = self._passes.mask(layer, call)
        found = time.process_time()
        out = position_causal_attention(q, k, v, self._plan, scale, mask=kept)
        if self._is_counted:
            self._count(kept, found - began, time.process_time() - began)
        return out[None], None

    def _count(self, kept: BlockMask | None, mask_s: float, attention_s: float) -> None:
        assert self._plan is not None
        positions = self._plan.positions
        seen = int(positions.sum()) + positions.numel()
        blocks = None if kept is None else kept.requests[0]
        self._spent.mask_s += mask_s
        self._spent.attention_s += attention_s
        self._spent.seen += seen
        self._spent.read += float(seen) if blocks is None else blocks.keys_read(positions)


def blocks_of(method: AttentionMethod, layer: int, call: AttentionCall) -> RequestBlocks | None:
    """Return the mask that a method makes for a call of one request; None where it reads everything."""
    made = MethodsOfPass(call.plan, [method]).mask(layer, call)
    return None if made is None else made.requests[0]
