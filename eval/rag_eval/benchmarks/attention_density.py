"""Attention methods brought to one density: the option that sets it is found on the real attention of a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from rag_eval.errors import EvalError
from rag_kernels import create_attention_method

SHORTEST = 1280
"""Tokens of a prompt from which on densities are compared: rows in front of 1,024 read everything with SALE."""
_STEPS = 9
"""Halvings of an option's range."""
TOLERANCE = 0.004
"""A density as near as this is the one that was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """The option of a method that sets its density.

    Attributes
    ----------
    option : str
        Its name.
    low, high : float
        Values between which the density goes from few keys to all, or the other way.
    is_whole : bool
        Whole numbers only; ``high`` is then that of the prompt's blocks, and all are tried.
    is_log : bool
        Halved by its logarithm.
    with_options : str
        Options without which the knob is not alone.
    """

    option: str
    low: float = 1.0
    high: float = 0.0
    is_whole: bool = False
    is_log: bool = False
    with_options: str = ""


KNOBS = {
    "sale": Knob(option="thresholds", low=1.0, high=1e-5, is_log=True),
    "power": Knob(option="window", is_whole=True),
    "streaming": Knob(option="window", is_whole=True),
    "strided": Knob(option="window", is_whole=True),
    "dilated": Knob(option="window", is_whole=True),
    "longnet": Knob(option="segment", is_whole=True),
    "vertical_slash": Knob(option="vertical", is_whole=True),
    "block_topk": Knob(option="share", low=0.0, high=1.0, with_options="blocks=1"),
    "xattention": Knob(option="threshold", low=0.01, high=1.0),
}
"""By method. ``vertical_slash`` reads as many slashes as verticals."""


def length_words(lengths: str, *, shortest: int) -> list[str]:
    """Read a list of lengths.

    Raises
    ------
    EvalError
        One line: what is no length.
    """
    words = [word.strip() for word in lengths.split(",") if word.strip()]
    if not words or not all(word.isdigit() and int(word) >= shortest for word in words):
        raise EvalError(
            f"lengths is {lengths!r}; give numbers from {shortest} on, such as 4096,8192"
        )
    return words


def density_by_length(lengths: str, density: str) -> dict[int, float]:
    """Read two lists of numbers.

    Raises
    ------
    EvalError
        One line: what is no length or no density, or how many there are.
    """
    words = length_words(lengths, shortest=SHORTEST)
    try:
        shares = [float(word) for word in density.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share < 1 for share in shares):
        raise EvalError(f"density is {density!r}; give numbers between 0 and 1, such as 0.3")
    if len(shares) not in (1, len(words)):
        raise EvalError(
            f"{len(shares)} densities for {len(words)} lengths; give one for all, or one for each"
        )
    shares *= len(words) if len(shares) == 1 else 1
    return dict(sorted(zip(map(int, words), shares, strict=True)))


def brought_to(text: str, density: float, tokens: int, density_of: Callable[[str], float]) -> str:
    """Find the options with which a method reads a share of the keys.

    A baseline gets the smallest reading that is not below the density, SALE the largest that is not above it: where
    whole blocks do not let them be equal, the difference is in favour of the baselines. :data:`TOLERANCE` is equal.

    Parameters
    ----------
    text : str
        Method, with other options if wanted. One that names the option of its knob itself is left as it is, and so is
        ``dense``.
    density : float
        Share of the keys, 0 to 1.
    tokens : int
        Length of the prompts.
    density_of : callable
        Share of the keys that a method reads, by its text.

    Returns
    -------
    str
        The method with its options. Where the density is out of reach, the nearest that it can.

    Raises
    ------
    EvalError
        A method of which nobody said which option sets its density.
    """
    name, _, tail = text.partition(":")
    given = {pair.partition("=")[0] for pair in tail.split("+") if pair}
    if name == "dense":
        return text
    if name not in KNOBS:
        raise EvalError(
            f"which option sets the density of {name!r} is not known; known: {', '.join(KNOBS)}. "
            "Leave it out, or ask for no density"
        )
    knob = KNOBS[name]
    if knob.option in given:
        return text
    if name == "sale":
        return _halved(text, knob, density, density_of, from_above=False)
    if not knob.is_whole:
        return _halved(text, knob, density, density_of, from_above=True)
    block = create_attention_method(text).config.block
    return _counted(text, knob, density, -(-tokens // block), density_of)


def _with(text: str, knob: Knob, value: float) -> str:
    shown = str(int(value)) if knob.is_whole else f"{value:.6g}"
    options = [f"{knob.option}={shown}"]
    if knob.option == "vertical":
        options.append(f"slash={shown}")
    if knob.with_options and knob.with_options.partition("=")[0] not in text:
        options.append(knob.with_options)
    return text + ("+" if ":" in text else ":") + "+".join(options)


def _halved(
    text: str,
    knob: Knob,
    density: float,
    density_of: Callable[[str], float],
    *,
    from_above: bool,
) -> str:
    """Halve the range; ``low`` reads fewer keys than ``high``."""
    few, many = (math.log(x) if knob.is_log else x for x in (knob.low, knob.high))

    def named(at: float) -> str:
        return _with(text, knob, math.exp(at) if knob.is_log else at)

    for _ in range(_STEPS):
        middle = (few + many) / 2
        found = density_of(named(middle))
        is_near = 0 <= (found - density if from_above else density - found) <= TOLERANCE
        if is_near:
            return named(middle)
        if found < density:
            few = middle
        else:
            many = middle
    return named(many if from_above else few)


def _counted(
    text: str, knob: Knob, density: float, blocks: int, density_of: Callable[[str], float]
) -> str:
    """Take the smallest number with which at least as many keys are read; they need not rise evenly."""
    low, high = 1, blocks
    while low < high:
        middle = (low + high) // 2
        if density_of(_with(text, knob, middle)) < density:
            low = middle + 1
        else:
            high = middle
    return _with(text, knob, low)
