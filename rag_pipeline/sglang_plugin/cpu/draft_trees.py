"""Trees of drafted tokens in plain torch: read from a mask, walked along what the model says or what is drawn from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["keep_top_k", "keep_top_p", "read_tree", "sample_tree", "verify_tree"]


def read_tree(
    tree_mask: Tensor,
    verified_seq_len: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Positions, first children and next siblings of the nodes of each tree, written into the tensors given.

    Parameters
    ----------
    tree_mask : Tensor
        bool, ``batch_size * n * n`` entries: ``[b, i, j]`` where node ``j`` is ``i`` or an ancestor of it.
    verified_seq_len : Tensor
        Tokens of each request before its tree, ``[batch_size]``.
    positions : Tensor
        ``[batch_size * n]``, gets the absolute position of each node.
    retrieve_index, retrieve_next_token, retrieve_next_sibling : Tensor
        ``[batch_size, n]``: place of each node in the batch, its first child and its next sibling, -1 for none.
    batch_size, draft_token_num : int
        Requests, and nodes ``n`` of each tree.
    """
    n = draft_token_num
    above = tree_mask.reshape(batch_size, n, n).bool().tril(-1)
    at = torch.arange(n)
    positions.copy_((above.sum(-1) + verified_seq_len[:, None]).flatten())
    retrieve_index.copy_(torch.arange(batch_size * n).view(batch_size, n))
    parents = torch.where(above, at, -1).amax(-1)
    # [b, i, k]: k is a child of i; k stands behind i with the same parent.
    child = parents[:, None, :] == at[:, None]
    sibling = (parents[:, None, :] == parents[:, :, None]) & (at > at[:, None])
    sibling &= parents[:, :, None] >= 0
    for found, out in ((child, retrieve_next_token), (sibling, retrieve_next_sibling)):
        first = torch.where(found, at, n).amin(-1)
        out.copy_(torch.where(first < n, first, -1))


def verify_tree(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk each tree along the tokens that the model wants; SGLang's ``verify_tree_greedy_func``.

    Parameters
    ----------
    predicts : Tensor
        ``[batch * n]``, gets the model's token behind each accepted node.
    accept_index : Tensor
        ``[batch, depth]``, gets the places of accepted nodes, the root first.
    accept_token_num : Tensor
        ``[batch]``, gets how many were accepted, the root not counted.
    candidates, retrieve_index, retrieve_next_token, retrieve_next_sibling : Tensor
        The trees, ``[batch, n]``, as :func:`read_tree` writes them.
    target_predict : Tensor
        ``[batch, n]``: the token that the model wants behind each node.
    topk : int
        Unused here.
    """
    tokens, wanted, place = candidates.tolist(), target_predict.tolist(), retrieve_index.tolist()
    children, siblings = retrieve_next_token.tolist(), retrieve_next_sibling.tolist()
    for row, want in enumerate(wanted):
        node, accepted = 0, [0]
        while len(accepted) < accept_index.shape[1]:
            child = children[row][node]
            while child >= 0 and tokens[row][child] != want[node]:
                child = siblings[row][child]
            if child < 0:
                break
            node = child
            accepted.append(node)
        for order, node in enumerate(accepted):
            accept_index[row, order] = place[row][node]
            predicts[place[row][node]] = want[node]
        accept_token_num[row] = len(accepted) - 1
    return predicts, accept_index, accept_token_num


def sample_tree(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    target_probs: Tensor,
    **unused: Any,
) -> None:
    """As :func:`verify_tree`, with a token drawn from the model's distribution behind each node.

    The walk stops where no child is the drawn token, so the answer has the distribution of sampling one by one.

    Parameters
    ----------
    predicts, accept_index, accept_token_num : Tensor
        Written, as there.
    candidates, retrive_index, retrive_next_token, retrive_next_sibling : Tensor
        The trees, as there; the names are SGLang's.
    uniform_samples : Tensor
        ``[batch, n]``, uniform in [0, 1).
    target_probs : Tensor
        ``[batch, n, vocabulary]``.
    **unused : Any
        What approximate acceptance asks for: thresholds, and the probabilities of drafts.
    """
    sums = target_probs.double().cumsum(-1)
    coins = uniform_samples.double()[..., None] * sums[..., -1:]
    drawn = torch.searchsorted(sums, coins, right=True)[..., 0].clamp_(max=sums.shape[-1] - 1)
    tree = (candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    verify_tree(predicts, accept_index, accept_token_num, *tree, drawn)


def keep_top_k(probs: Tensor, top_k: Tensor) -> Tensor:
    """Distributions ``[rows, vocabulary]`` over their ``top_k`` ``[rows]`` likeliest tokens."""
    order = probs.sort(-1, descending=True)
    gone = torch.arange(probs.shape[-1]) >= top_k[:, None]
    return _renormalised(order, gone)


def keep_top_p(probs: Tensor, top_p: Tensor) -> Tensor:
    """Distributions ``[rows, vocabulary]`` over the fewest tokens that have ``top_p`` ``[rows]`` together."""
    order = probs.sort(-1, descending=True)
    gone = order.values.cumsum(-1) - order.values > top_p[:, None]
    return _renormalised(order, gone)


def _renormalised(order: Any, gone: Tensor) -> Tensor:
    kept = order.values.masked_fill(gone, 0.0)
    return torch.zeros_like(kept).scatter_(-1, order.indices, kept / kept.sum(-1, keepdim=True))
