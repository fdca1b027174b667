"""Chunk-KV fusion in SGLang's forward pass.

A prompt is ``[system][chunk 1] ... [chunk N][question]``. The radix tree serves the exact prefix and is never touched.
Chunks behind it that are stored are loaded at their new positions (keys rotated by the difference), a policy
names the few rows to compute anew, and those run together with all fresh rows as one smaller batch whose
attention is causal by absolute position. How a request travels, module by module:

=================  ==================================================================================
``request_spans``  the client's wish, checked in the tokenizer process (HTTP 400), read in the scheduler
``admission``      when a request is considered for a batch: match, lease, charge the scheduler's budget
                   with rows really computed, say how much may be published as exact
``plan``           rows of a piece (chunked prefill) as plain arithmetic
``forward``        around ``ModelRunner.forward``: the fused pass, ordinary prefill if it fails, capture
``fused_forward``  loads, row selection, the batch of the fused pass; ``fused_item``: one request of it
``probing``        the passes that a signal of ``chunk_cache.policies`` asks for; ``scratch``: room for a draft
``batch_view``     a ``ForwardBatch`` with fewer rows
``attention``      around ``RadixAttention.forward``: load, write, attend
``capture``        chunk KV out of the paged pool into the store
``radix``          the tree: fused KV never becomes exact
``conversation``   what a turn leaves for the next of the same conversation; ``turns``: which there are
``background``     missing chunks, computed when the engine is idle
``context``        identity of the model, its rotation; ``support``: what is refused and why
``disk``           the folder that chunk KV is read from and written to; ``erased``: deleted text goes
``consent``        which prompts may be approximated at all
``metrics``        counters in SGLang's ``/metrics``; ``self_check``: proof at start; ``tp``: ranks agree
``runtime``        the process-wide object that holds all this; ``hooks``: the table of hooked targets
=================  ==================================================================================

Why rows are chosen before layer 0, and probing passes are stopped and run again instead of shrinking a batch inside
a layer: shrinking needs SGLang's residual stream and per-layer hooks of every model family; running the few
chosen rows again through the checked layers costs about ``r * check_layer / num_layers`` of a prefill and needs
neither. All of it is counted in ``computed_fraction`` and paid from the ratio.

What may go wrong and costs only speed: matching, planning, a probing pass, the fused pass itself, capture. A batch whose
fused forward fails is prefilled as usual in the same forward, every row that may be wrong included; the reason is
counted and in the report, the fault is logged once a kind, and eight in a row turn fusion off.
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
