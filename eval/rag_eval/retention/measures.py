"""How good a memory is: attention that it covers, evidence that it holds, and the likelihood of the accepted answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rag_eval.retention.model import LayerCache, ShownModel, joined
from rag_eval.retention.sensitivity import rows_at
from rag_eval.retention.talk import AskedQuestion, Talk


def full_caches(model: ShownModel, talk: Talk, block_tokens: int) -> list[LayerCache]:
    """Prefill the system part, the history and the tail without eviction."""
    ids = [*talk.system, *talk.history, *talk.tail]
    caches: list[LayerCache] = []
    for start in range(0, len(ids), block_tokens):
        caches = joined(caches, rows_at(model, ids, start, start + block_tokens, caches))
    return caches


def question_mass(
    model: ShownModel, talk: Talk, question: AskedQuestion, full: Sequence[LayerCache]
) -> Tensor:
    """Attention that the question's tokens pay to each key of the history, with nothing evicted.

    Returns
    -------
    Tensor
        fp32 ``[layers, H, history]``: softmax weights, summed over rows and the query heads of the group.
    """
    prefix, history = len(talk.system), len(talk.history)
    rows = model.forward(question.ids, prefix + history + len(talk.tail), full).layers
    found = []
    for cache, own in zip(full, rows, strict=True):
        heads, tokens, size = own.k.shape
        k = torch.cat((cache.k, own.k), 1).float()
        q = own.q.float().view(heads, -1, tokens, size)
        logits = torch.einsum("hgtd,hnd->hgtn", q, k) / size**0.5
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        logits[..., -tokens:].masked_fill_(hidden, float("-inf"))
        weights = logits.softmax(-1)[..., prefix : prefix + history]
        found.append(weights.sum((1, 2)))
    return torch.stack(found)


def kept_mask(kept: Sequence[LayerCache], talk: Talk) -> Tensor:
    """Which tokens of the history each head still has: bool ``[layers, H, history]``."""
    prefix, history = len(talk.system), len(talk.history)
    found = []
    for cache in kept:
        places = cache.positions - prefix  # negative: padding, or the system part
        mask = torch.zeros(places.shape[0], history + 1, dtype=torch.bool)
        mask.scatter_(1, torch.where(places >= 0, places, history), True)
        found.append(mask[:, :history])
    return torch.stack(found)


def mass_recall(mass: Tensor, kept: Tensor) -> float:
    """Share of the question's attention to the history that falls on kept tokens; mean over layers and heads."""
    return float(((mass * kept).sum(2) / mass.sum(2)).mean())


def evidence_share(question: AskedQuestion, kept: Tensor) -> float:
    """Share of the evidence's tokens that are kept; mean over layers and heads."""
    places = [i for start, end in question.evidence for i in range(start, end) if i < kept.shape[2]]
    return float(kept[:, :, places].float().mean()) if places else 1.0


def with_tail(model: ShownModel, talk: Talk, caches: Sequence[LayerCache]) -> list[LayerCache]:
    """Put the tail behind a system part and a memory."""
    if not talk.tail:
        return list(caches)
    start = len(talk.system) + len(talk.history)
    ids = [*talk.system, *talk.history, *talk.tail]
    return joined(caches, rows_at(model, ids, start, len(ids), caches))


def answer_loss(
    model: ShownModel, talk: Talk, question: AskedQuestion, caches: Sequence[LayerCache]
) -> float:
    """Mean loss of the accepted answer's tokens behind caches that end with the tail, nats per token."""
    start = len(talk.system) + len(talk.history) + len(talk.tail)
    answer = len(question.answer_ids)
    ids = [*question.ids, *question.answer_ids]
    logits = model.forward(ids, start, caches, logits=answer + 1).logits
    return float(cross_entropy(logits[:-1], torch.tensor(question.answer_ids)))
