"""Names of the ways to serve a prompt that a run compares."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from chunk_cache.policies import create_policy, policy_names
from rag_eval.errors import EvalError

FULL = "full"
PREFIX = "prefix"
PLAIN_REUSE = "reuse+passage=false"
"""The yardstick: chunk KV computed right behind the shared prefix, nothing recomputed."""


def yardstick(modes: Collection[str]) -> str | None:
    """Mode that the others' KL is compared with: plain reuse, else ``reuse``; None without either."""
    return next((name for name in (PLAIN_REUSE, "reuse") if name in modes), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """One way to serve a prompt.

    Parameters
    ----------
    name : str
        As given, and as it stands in every table: ``full``, ``prefix``, ``query:0.15``, or with
        options of the policy ``query:0.15+mean_shift=0``.
    policy : str
        Selection policy; empty for ``full`` (nothing cached) and ``prefix`` (stock RadixAttention).
    ratio : float or None
        Recompute budget; ``None`` leaves the policy's default.
    options : dict of str to (float, int, bool or str)
        Further fields of the policy's configuration.
    passage : bool
        Whether chunk KV is used that was computed behind the neutral passage; ``reuse+passage=false``
        is reuse of KV computed right behind the shared prefix.
    """

    name: str
    policy: str = ""
    ratio: float | None = None
    options: dict[str, float | int | bool | str] = field(default_factory=dict)
    passage: bool = True

    @property
    def fused(self) -> bool:
        """Whether chunk KV is reused away from a prefix."""
        return bool(self.policy)


def parse_modes(text: str | Sequence[str]) -> tuple[Mode, ...]:
    """Read ``full,prefix,reuse,cacheblend:0.15``; ``full`` is always there, as the reference.

    Raises
    ------
    EvalError
        An unknown or repeated mode, or an option that its policy does not take.
    """
    names = text.split(",") if isinstance(text, str) else list(text)
    names = [name.strip() for name in names if name.strip()]
    if FULL not in names:
        names.insert(0, FULL)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise EvalError(f"mode {twice!r} is given twice; name each mode once")
    return tuple(_parse(name) for name in names)


def _parse(name: str) -> Mode:
    if name in (FULL, PREFIX):
        return Mode(name=name)
    head, *pairs = name.split("+")
    base, colon, tail = head.partition(":")
    allowed = ", ".join([FULL, PREFIX, *(p for p in policy_names() if p != FULL)])
    if base not in policy_names() or base == FULL:
        raise EvalError(
            f"mode {name!r} is not known; allowed: {allowed}, with :RATIO behind a policy"
        )
    try:
        ratio = float(tail) if colon else None
    except ValueError:
        raise EvalError(f"mode {name!r}: {tail!r} is not a ratio; write {base}:0.15") from None
    options: dict[str, float | int | bool | str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise EvalError(f"mode {name!r}: option {pair!r} is not KEY=VALUE")
        options[key] = _value(value)
    passage = options.pop("passage", True)
    if not isinstance(passage, bool):
        raise EvalError(f"mode {name!r}: passage is {passage!r}; write true or false")
    try:
        create_policy(base, ratio, **options)
    except (ValueError, TypeError) as error:
        raise EvalError(f"mode {name!r}: {error}") from None
    return Mode(name=name, policy=base, ratio=ratio, options=options, passage=passage)


def _value(text: str) -> float | int | bool | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
