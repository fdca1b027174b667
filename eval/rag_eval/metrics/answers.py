"""Answer scores: exact match, token F1, ROUGE-L, and the share of wanted parts.

EM and F1 follow the official SQuAD v1.1 evaluation (Rajpurkar et al. 2016): lower case, no
punctuation, no articles, single spaces; best score over the accepted answers. ROUGE-L is the F
measure of the ``rouge-score`` package without stemming, which differs slightly from the package
``rouge`` that LongBench uses.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Text as SQuAD compares it."""
    return " ".join(_ARTICLES.sub(" ", plain_words(text)).split())


def plain_words(text: str) -> str:
    """Text in lower case without punctuation."""
    return text.lower().translate(_DROP_PUNCTUATION)


def first_line(text: str) -> str:
    """Answer up to the first line break: small models go on with further questions."""
    stripped = text.strip()
    return stripped.split("\n", 1)[0].strip()


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the normalised prediction equals one of the normalised answers."""
    wanted = {normalise(answer) for answer in answers}
    return float(normalise(prediction) in wanted)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 over the answers, on multisets of normalised words, between 0 and 1."""
    return max(
        (bag_f1(normalise(prediction).split(), normalise(a).split()) for a in answers), default=0.0
    )


def bag_f1(found: list[str], wanted: list[str]) -> float:
    """F1 of two multisets of words; two empty ones agree."""
    # Two empty answers agree (SQuAD v2 convention for answers that are only articles).
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """Best ROUGE-L F measure over the answers, between 0 and 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return max(
        (float(scorer.score(answer, prediction)["rougeL"].fmeasure) for answer in answers),
        default=0.0,
    )


def parts_found(prediction: str, parts: Sequence[str]) -> float:
    """Share of `parts` that occur in the prediction, case ignored (RULER's "match all")."""
    text = prediction.lower()
    return sum(part.lower() in text for part in parts) / len(parts)
