"""Chunk-KV fusion in SGLang's forward pass.

A prompt is ``[system][chunk 1] ... [chunk N][question]``. The radix tree serves the exact prefix and is never touched.
Chunks behind it that are stored are loaded at their new positions (keys rotated by the difference), a policy
names the few rows to compute anew, and those run together with all fresh rows as one smaller batch whose
attention is causal by absolute position. The rooms, in the order of their arrows,
``request <- runtime <- builds <- conversations <- forward <- admission``:

=================  ==================================================================================
``request``        what one request wants, what fusion knows of it, and what its client is told
``runtime``        what a scheduler process holds: the model, the ranks, the store, the counters
``builds``         chunk KV out of the pool into the store and the folder, and out of both again
``conversations``  what one turn of a conversation leaves for the next
``forward``        one forward pass over fewer rows, and ordinary prefill where it fails
``admission``      what a request may load, store and publish when the scheduler considers it
=================  ==================================================================================

Above them stand ``hooks`` (the table of hooked targets), ``startup`` and ``self_check`` (proof on the loaded model);
below them ``config``. ``ARCHITECTURE.md`` draws how a request travels through them.

Why rows are chosen before layer 0, and probing passes are stopped and run again instead of shrinking a batch inside
a layer: shrinking needs SGLang's residual stream and per-layer hooks of every model family; running the few
chosen rows again through the checked layers costs about ``r * check_layer / num_layers`` of a prefill and needs
neither. All of it is counted in ``computed_fraction`` and paid from the ratio.

What may go wrong and costs only speed: matching, planning, a probing pass, the fused pass itself, capture. A batch whose
fused forward fails is prefilled as usual in the same forward, every row that may be wrong included; the reason is
counted and in the report, the fault is logged once per kind, and eight in a row turn fusion off.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Register fusion's hooks in the calling process; called by the plugin's entry point."""
    from rag_pipeline.sglang_plugin.fusion.config import FusionConfig

    if not FusionConfig.from_env().enabled:
        return
    from rag_pipeline.sglang_plugin.fusion import hooks

    hooks.register_hooks()
