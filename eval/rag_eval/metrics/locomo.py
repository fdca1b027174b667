"""LoCoMo's answer score: token F1 on stemmed words (arXiv 2402.17753, as its evaluation computes it).

Like SQuAD's F1, but commas go first, ``and`` is dropped with the articles, and words are compared by Porter's stem. A
multi-hop answer is a list, comma between: each of its parts counts by the best part of the prediction. Of an
open-domain answer only what stands before the first semicolon counts.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from rag_eval.metrics.answers import bag_f1, plain_words

if TYPE_CHECKING:
    from nltk.stem.porter import PorterStemmer

_DROPPED = re.compile(r"\b(a|an|the|and)\b")


def locomo_f1(prediction: str, answer: str, category: str) -> float:
    """Score of a prediction, between 0 and 1.

    Parameters
    ----------
    prediction, answer : str
        What the model said, and what the data set says.
    category : str
        ``multi-hop`` and ``open-domain`` are scored as above, every other one as one text.
    """
    if category == "open-domain":
        answer = answer.split(";")[0]
    if category != "multi-hop":
        return _f1(prediction, answer)
    parts = answer.split(",")
    said = prediction.split(",")
    return sum(max(_f1(one, part) for one in said) for part in parts) / len(parts)


def _f1(prediction: str, answer: str) -> float:
    found, wanted = _stems(prediction), _stems(answer)
    return bag_f1(found, wanted) if found and wanted else 0.0


def _stems(text: str) -> list[str]:
    words = _DROPPED.sub(" ", plain_words(text)).split()
    return [_stemmer().stem(word) for word in words]


@functools.cache
def _stemmer() -> PorterStemmer:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
