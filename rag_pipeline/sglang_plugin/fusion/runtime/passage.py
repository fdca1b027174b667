"""The neighbour passage: neutral text that chunk KV is computed behind, so that it looks like KV from mid-prompt.

A chunk computed right behind the system prompt has never seen other text before it, and its keys and values differ
from those of a full prefill in a way that is much the same for every chunk: over 60 HotpotQA chunks the mean
difference alone explained 27% of the squared deviation of the keys (SmolLM2-135M). Computing chunks behind one fixed
passage removes that common part when they are built, at no cost when they are used. Chunks at their own place, right
behind the shared prefix, still take the KV that was computed there: it is exact.

Adaptive Parallel Encoding (arXiv 2502.05431) aligns separately computed contexts with a shared prefix for the same
reason; here the passage is dropped after the build and only the chunk's own KV is kept.
"""

from __future__ import annotations

import re
from bisect import bisect
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rag_pipeline.errors import EngineError

MAX_CONTEXT_SHARE = 4
"""The passage takes at most one n-th of what a prompt may hold, so that every usual chunk fits behind it."""

_END = "\n\n"

_TEXT = """\
[Rivers and their valleys]
A river begins where more water falls than the ground can hold. Small streams join, and each junction makes the \
channel wider and the flow steadier. In the upper course the slope is steep and the water cuts downwards, so valleys \
are narrow and their sides are rough. Further down the slope eases, the river swings from side to side, and the \
bends slowly move across the plain. During a flood fine mud settles on the fields, which is why many early towns \
were built near rivers in spite of the danger. Where the current meets the sea it drops what is left of its load, \
and a delta may grow. Engineers have straightened many rivers for shipping, and have since given some of them back \
their bends, because a slow river stores water and cools its banks in summer.

[A short account of bread]
Flour, water, salt and time are enough to make bread. When flour is wetted, two of its proteins form an elastic net, \
and kneading makes the net finer. Yeast lives on the sugars of the dough and gives off gas, which the net holds as \
bubbles. A warm dough rises within two hours, a cool one overnight, and the slow one tastes of more. In the oven the \
gas expands, the starch sets, and the surface turns brown above about one hundred and forty degrees. Rye behaves \
otherwise: its proteins hold little gas, so bakers sour the dough to keep the starch from breaking down. Flat breads \
need no yeast at all and are baked on stones, in pans, or on the wall of a clay oven, in most parts of the world.

[Timetables]
Before railways every town kept its own noon. Trains made the differences visible, since a journey of one hour could \
end ten minutes early or late depending on the direction. Companies therefore agreed on a common time along their \
lines, and governments later adopted it. A timetable looks simple, but it has to respect single tracks, the time \
that a train needs to brake, the crews that must be home by night, and the passengers who change. Planners draw it as \
a graph with stations on one side and hours on the other: each train is a line, and two lines may cross only where \
there are two tracks. Regular intervals are easier to remember, so many countries repeat the same minute every hour.

[Bees in the garden]
Of the many species of bees only a few live in large colonies. Most dig a nest in sand, or use hollow stems, and \
each female provides for her own young. They fly for a few weeks of the year, often to the flowers of one family \
only. Gardeners help them more with open soil and native plants than with boxes alone. Honey bees, by contrast, keep \
a stock for the winter and tell each other by a dance where nectar was found: the angle gives the direction from the \
sun, the length of the run gives the distance. On cold days they form a cluster and warm it with their flight \
muscles, changing places so that none stays outside for long.

[Lighthouses]
The first lights for ships were open fires on towers and hills. Oil lamps with mirrors replaced them, and in the \
nineteenth century rings of glass prisms gathered nearly all of the light into one beam. Each station received its \
own rhythm of flashes and pauses, listed in a book, so that a captain could tell one headland from the next. Keepers \
wound the clockwork that turned the lens, trimmed the wicks and wrote down the weather. Electric lamps needed less \
care, and by the end of the twentieth century most stations ran by themselves. Many of the towers are still kept in \
order, partly for sailors in small boats and partly because people are fond of them.
"""


def read_passage(path: str) -> str:
    """Text of a passage file; the built-in prose when `path` is empty.

    Raises
    ------
    EngineError
        The file cannot be read, is not UTF-8, or holds no word.
    """
    if not path:
        return _TEXT
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"fusion.passage_file {path} cannot be read: {error}") from None
    if not text.strip():
        raise EngineError(f"fusion.passage_file {path} is empty; give some paragraphs of text")
    return text


def passage_ids(
    tokenizer: Any, num_tokens: int, capacity: int, *, text: str = _TEXT
) -> npt.NDArray[np.int64]:
    """Token ids of the passage.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer or None
        The engine's; without one there is no passage.
    num_tokens : int
        Most tokens of it; 0 for none. It ends with a sentence and an empty line, as what stands before a chunk does.
    capacity : int
        Tokens that a prompt may hold in this engine.
    text : str
        Of the passage; what looks like a control token in it stays text.

    Returns
    -------
    ndarray
        int64 ``[<= num_tokens]``.
    """
    wanted = min(num_tokens, capacity // MAX_CONTEXT_SHARE)
    if tokenizer is None or wanted <= 0:
        return np.empty(0, dtype=np.int64)

    def encode(words: str) -> list[int]:
        ids: list[int] = tokenizer.encode(
            words, add_special_tokens=False, split_special_tokens=True
        )
        return ids

    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]
    # A passage that stops in a word gives the chunk's first tokens a beginning that no prompt has.
    whole = bisect(ends, wanted, key=lambda end: len(encode(text[:end] + _END)))
    ids = encode(text[: ends[whole - 1]] + _END) if whole else encode(text)[:wanted]
    return np.asarray(ids, dtype=np.int64)
