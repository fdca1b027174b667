"""Decoding by an attention method: the keys of each token, found before layer 0 and handed to the attention backend.

Tokens that are decoded beside prompts, in one batch (``--enable-mixed-chunk``), read every key: that batch is a prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rag_kernels import AttentionMethod
from rag_pipeline.sglang_plugin.cpu.decode_reads import DECODE_READS_KEY, DecodeReads
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState, state_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


def mark_reads(runtime: FusionRuntime, batch: Any, reqs: Sequence[Any], backend: Any) -> None:
    """Hang on a decode batch what its tokens read; a batch without a method is left as it is.

    A method that fails here, or says what no token can read, costs its request speed: it decodes densely from then on.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    batch : ForwardBatch
        In decode mode.
    reqs : sequence of Req
        Its requests.
    backend : object
        Attention backend of the batch; one that gathers no positions decodes densely, which is said once.
    """
    states = [state_of(req) for req in reqs]
    sparse = {
        index: state
        for index, state in enumerate(states)
        if state is not None and state.decode_method is not None
    }
    if not sparse:
        return
    if not getattr(backend, "gathers_positions", False):
        runtime.say_once(
            "decode",
            "The attention backend %s reads every key in decoding.",
            type(backend).__name__,
        )
        for state in sparse.values():
            state.decode_densely()
        return
    assert runtime.facts is not None
    lengths = batch.seq_lens.tolist()
    positions: list[Tensor | None] = [None] * len(states)
    dense = [frozenset[int]()] * len(states)
    for index, state in sparse.items():
        found = _reads(runtime, state, lengths[index], runtime.facts.num_layers)
        if found is not None:
            positions[index], dense[index] = found
    if any(kept is not None for kept in positions):
        reads = DecodeReads(positions=tuple(positions), dense_layers=tuple(dense))
        batch.model_specific_states = {
            **(batch.model_specific_states or {}),
            DECODE_READS_KEY: reads,
        }


def decode_densely(runtime: FusionRuntime, reqs: Sequence[Any]) -> None:
    """Have requests of a batch of drafted tokens read every key, whatever their method says of decoding; said once."""
    for req in reqs:
        state = state_of(req)
        if state is not None and state.decode_method is not None:
            runtime.say_once("decode", "Drafted tokens (NGRAM) read every key in decoding.")
            state.decode_densely()


def kept_positions(method: AttentionMethod, position: int) -> Tensor:
    """Positions of the blocks that a decoded token reads; int64 ``[n]``, rising, its own the last.

    Raises
    ------
    ValueError
        The method's blocks are no blocks that a token at this position can read.
    """
    size = method.config.block
    blocks = method.decode_blocks(position)
    kept = (blocks[:, None] * size + torch.arange(size)).flatten()
    kept = kept[kept <= position]
    is_rising = bool((kept[1:] > kept[:-1]).all())
    if not kept.numel() or int(kept[0]) < 0 or int(kept[-1]) != position or not is_rising:
        raise ValueError(
            f"blocks {blocks.tolist()} of {size} tokens for position {position}; they must rise and end with its own"
        )
    return kept


def _reads(
    runtime: FusionRuntime, state: RequestState, length: int, num_layers: int
) -> tuple[Tensor, frozenset[int]] | None:
    method = state.decode_method
    assert method is not None
    try:
        layers = frozenset(layer for layer in range(num_layers) if method.reads_all(layer))
        return kept_positions(method, length - 1), layers
    except Exception as error:
        runtime.say_once(
            f"decode {method.name} {type(error).__name__}",
            "Attention method %r failed in decoding, which goes on densely: %s",
            method.name,
            error,
        )
        state.decode_densely()
        return None
