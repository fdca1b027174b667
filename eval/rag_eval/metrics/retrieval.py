"""Retrieval scores through ``ir-measures``, the TREC definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def retrieval_scores(
    gold: Mapping[str, Sequence[str]], ranked: Mapping[str, Sequence[str]], *, k: int
) -> dict[str, float]:
    """Recall and nDCG at `k`, averaged over the questions of `gold`.

    Parameters
    ----------
    gold : mapping of str to sequence of str
        Relevant document ids of every question.
    ranked : mapping of str to sequence of str
        Document ids of every question, best first; a question without an entry scores 0.
    k : int
        Cut-off.

    Returns
    -------
    dict
        ``recall_at_k`` and ``ndcg_at_k``, each between 0 and 1, and ``k``.
    """
    import ir_measures
    from ir_measures import R, nDCG

    qrels = [
        ir_measures.Qrel(question, document, 1)
        for question, documents in gold.items()
        for document in dict.fromkeys(documents)
    ]
    run = [
        ir_measures.ScoredDoc(question, document, float(-rank))
        for question, documents in ranked.items()
        for rank, document in enumerate(dict.fromkeys(documents))
    ]
    scores = ir_measures.calc_aggregate([R @ k, nDCG @ k], qrels, run)
    return {"recall_at_k": float(scores[R @ k]), "ndcg_at_k": float(scores[nDCG @ k]), "k": k}
