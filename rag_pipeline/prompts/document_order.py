"""Orders in which the retrieved documents stand in a prompt, by name."""

from __future__ import annotations

from collections.abc import Sequence

from rag_pipeline.errors import RagPipelineError

RETRIEVED = "retrieved"
"""As the retriever gave them: the default."""
BEST_LAST = "best_last"
"""The best next to the question."""
BOTH_ENDS = "both_ends"
"""The best at both ends and the worst in the middle, the best of all last (arXiv 2307.03172)."""

_RANKED = (RETRIEVED, BEST_LAST, BOTH_ENDS)
MAX_DOCUMENT_ORDER = 128
"""Characters of an order with the options of its attention method."""


def check_document_order(order: str) -> None:
    """Refuse what names no order.

    Parameters
    ----------
    order : str
        ``retrieved``, ``best_last``, ``both_ends``, or a static attention method with its options (``power``,
        ``power:block=64``): the best documents stand where the last row reads them
        (:func:`~rag_pipeline.prompts.power_order.place_for_power`).

    Raises
    ------
    RagPipelineError
        One line.
    """
    if order in _RANKED:
        return
    if not isinstance(order, str) or len(order) > MAX_DOCUMENT_ORDER:
        raise RagPipelineError(f"document_order is {order!r:.80}; {_ALLOWED}")
    from rag_pipeline.prompts.power_order import static_method

    try:
        static_method(order)
    except RagPipelineError as error:
        raise RagPipelineError(f"document_order is {order!r}: {error}; {_ALLOWED}") from None


_ALLOWED = (
    f"it must be {', '.join(_RANKED)}, or a static attention method such as power or power:block=64"
)


def ordered(
    order: str, scores: Sequence[float], lengths: Sequence[int], *, before: int, behind: int
) -> list[int]:
    """Say which document stands at which place.

    Parameters
    ----------
    order : str
        As for :func:`check_document_order`.
    scores : sequence of float
        Of the documents as the retriever gave them; the higher the better, equal ones as they come.
    lengths : sequence of int
        Tokens of each.
    before, behind : int
        Tokens of the prompt in front of the documents, and behind them.

    Returns
    -------
    list of int
        Indices of the documents, the first of the prompt first.
    """
    given = list(range(len(lengths)))
    if order == RETRIEVED or len(given) < 2:
        return given
    best_first = sorted(given, key=lambda index: -scores[index])
    if order == BEST_LAST:
        return best_first[::-1]
    from rag_pipeline.prompts import power_order

    if order == BOTH_ENDS:
        ranks = power_order.lost_in_the_middle_order(len(given))
    else:
        placed = power_order.place_for_power(
            [lengths[index] for index in best_first], before=before, behind=behind, method=order
        )
        ranks = list(placed.order)
    return [best_first[rank] for rank in ranks]
