"""A batch that fusion gave up: the ordinary batches that prefill it, none larger than SGLang would have made it.

A batch with fused requests holds more prompt tokens than SGLang's limits allow, since rows that are not computed were
not charged. When they have to be computed after all, it is in several passes.
"""

from __future__ import annotations

from typing import Any

from rag_pipeline.sglang_plugin.fusion.forward import plan as planning
from rag_pipeline.sglang_plugin.fusion.forward.batch_view import make_view, ordinary_rows
from rag_pipeline.sglang_plugin.fusion.forward.fused_item import BatchPlan


def ordinary_views(runner: Any, batch: Any, plan: BatchPlan, limit: int) -> list[Any]:
    """Ordinary batches that compute, in order, every row which a given up fused forward may have left wrong.

    Those of this piece are rows of the batch anyway. Of a prompt that comes in pieces, all from the first
    loaded token on: earlier pieces hold loaded KV, and probes wrote there too.

    Parameters
    ----------
    runner : ModelRunner
        SGLang's.
    batch : ForwardBatch
        As SGLang made it.
    plan : BatchPlan
        Its requests.
    limit : int
        Most rows of a pass.

    Returns
    -------
    list of ForwardBatch
        The outputs of the last one are the batch's. It is the batch itself where nothing had to be cut.
    """
    starts = [int(start) for start in batch.extend_prefix_lens_cpu]
    counts = [int(count) for count in batch.extend_seq_lens_cpu]
    ranges = [(start, start + count) for start, count in zip(starts, counts, strict=True)]
    fill_ids = {}
    for entry in plan.entries:
        if entry.state.exact_limit is not None and entry.protected_len < entry.piece.start:
            ranges[entry.index] = (entry.protected_len, entry.piece.end)
            fill_ids[entry.index] = entry.req.full_untruncated_fill_ids
    # A batch that holds what goes by its original rows runs as it is.
    tails = counts if plan.refused else _wanted_rows(batch, counts)
    passes = planning.ordinary_passes(ranges, tails, limit, fills_last=not plan.refused)
    views = []
    for part in passes:
        is_last = part is passes[-1]
        if is_last and [end - start for _, start, end in part] == counts:
            views.append(batch)
            continue
        rows = [
            ordinary_rows(
                runner.req_to_token_pool.req_to_token, batch, index, start, end, fill_ids.get(index)
            )
            for index, start, end in part
        ]
        views.append(make_view(batch, rows, None, whole_batch=is_last))
    return views


def _wanted_rows(batch: Any, counts: list[int]) -> list[int]:
    """Rows at the end of each request whose output is wanted: the last, and those with input log-probabilities."""
    begins = batch.extend_logprob_start_lens_cpu
    if not batch.return_logprob or begins is None:
        return [1] * len(counts)
    return [max(1, count - int(begin)) for count, begin in zip(counts, begins, strict=True)]
