"""A draft of the answer, by prompt lookup: its attention shows what the answer will look at (Lookahead Q-Cache).

The question's rows show where an answer stands; what is copied from there, and what follows it, is looked at by the
answer's own tokens. Pseudo queries of this kind were proposed for evicting KV (Lookahead Q-Cache, arXiv 2505.20334);
here they choose what is recomputed. Only the first token is decoded, over the KV as loaded. The others are looked up
in the chunks, as prompt lookup decoding does: decoding them one by one scored no better and cost one pass each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NEAR = 6
"""Attention is summed over so many positions before, and after, a token that may begin the answer."""


def look_up(
    first: int, prompt: Tensor, spans: Sequence[tuple[int, int]], mass: Tensor, tokens: int
) -> list[int]:
    """A draft: the likeliest first token, and what stands behind its most attended occurrence in the chunks.

    Parameters
    ----------
    first : int
        The answer's likeliest first token over the loaded KV.
    prompt : Tensor
        int64 ``[N]`` on the host: token ids.
    spans : sequence of (int, int)
        Position ranges of the chunks.
    mass : Tensor
        fp32 ``[kv_len]`` the question's attention, the same on every rank.
    tokens : int
        Most tokens of the draft.

    Returns
    -------
    list of int
        The first token alone where no chunk holds it.
    """
    prompt, near = prompt[: mass.numel()], _window_sums(mass.to("cpu", torch.float32))
    inside = torch.zeros(prompt.numel(), dtype=torch.bool)
    for start, end in spans:
        inside[start:end] = True
    found = ((prompt == first) & inside).nonzero().flatten()
    if not found.numel():
        return [first]
    at = int(found[near[found].argmax()])
    following = []
    for place in range(at + 1, min(at + tokens, prompt.numel())):
        if not inside[place]:
            break
        following.append(int(prompt[place]))
    return [first, *following]


def _window_sums(mass: Tensor) -> Tensor:
    """Attention near each position: what is looked at may be a word or two away from what is copied."""
    padded = torch.nn.functional.pad(mass.double(), (_NEAR, _NEAR)).cumsum(0)
    padded = torch.nn.functional.pad(padded, (1, 0))
    return padded[2 * _NEAR : 2 * _NEAR + mass.numel()] - padded[: mass.numel()]
