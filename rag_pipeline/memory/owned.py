"""Which tokens of a history are an episode's own: those of its segments, as it was known when a block came to its end.

EpiCache keeps by scores alone. Here what belongs to an episode stays before the rest (:mod:`chunk_cache.retention.owned`),
so each step names the ranges of the segments of its episode. They follow from the history up to the block, or up to where the
episode was opened, so the ids of a block never change when the history grows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.protocol.memory_fields import MAX_OWN_SPANS

if TYPE_CHECKING:
    from rag_pipeline.memory.clustering import Episode
    from rag_pipeline.memory.conversation import View
    from rag_pipeline.memory.growth import Version
    from rag_pipeline.memory.plan import Range


def own_spans(view: View, version: Version, episode: Episode, block: int) -> tuple[Range, ...]:
    """True positions of an episode's own tokens behind a block.

    A segment that goes on behind the block is own up to the block's end. Messages whose segment is not whole yet belong to
    no episode; they count as own for each, and the next block decides.

    Parameters
    ----------
    view : View
        The history; it has the block.
    version, episode : Version, Episode
        Whose record it is.
    block : int
        The block, from 0.

    Returns
    -------
    tuple of (int, int)
        Rising and disjoint, counted with the prefix; the newest ones where there are more than a request may name. None
        while there is one episode only.
    """
    end = (block + 1) * view.config.block_tokens
    finished = view.message_at(end - 1) + 1
    segments = max(finished // view.config.segment_utterances, episode.opened_at)
    with view.log.lock:
        if len(version.episodes_at(segments)) == 1:
            return ()
        labels = version.labels_at(segments)
    ranges = [
        (view.segment_start(segment), view.segment_start(segment + 1))
        for segment, label in enumerate(labels)
        if label == episode.index
    ]
    ranges.append((view.segment_start(len(labels)), end))
    prefix = len(view.prefix_ids)
    joined: list[Range] = []
    for start, stop in ranges:
        first, last = prefix + start, prefix + min(stop, end)
        if first >= last:
            continue
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return tuple(joined[-MAX_OWN_SPANS:])
