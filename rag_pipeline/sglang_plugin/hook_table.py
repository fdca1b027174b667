"""The one table of SGLang internals that this project hooks, and the check that they are there.

SGLang catches every ``Exception`` of a plugin and of a hook that cannot be applied, logs it, and
keeps serving *without* the plugin (``sglang.srt.plugins.load_plugins``, ``HookRegistry.apply_hooks``).
A RAG server that silently lost its cache is worse than one that does not start. So the targets are
resolved before SGLang gets to apply the hooks, and a fault is raised as :class:`PluginRefused`, a
``SystemExit``, which SGLang's ``except Exception`` lets through: the process stops with one line.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "CHECKED_WITH",
    "HookTarget",
    "PluginRefused",
    "add_hooks",
    "add_targets",
    "fail_hard",
    "hooked_targets",
    "targets",
    "unapplied_targets",
    "verify_targets",
]

CHECKED_WITH = "0.5.23"
"""The SGLang release that every row was written for and run with."""


class PluginRefused(SystemExit):
    """The plugin cannot do what it promises in this process; carries one line for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HookTarget:
    """One hooked callable of SGLang.

    Parameters
    ----------
    path : str
        Dotted path as ``HookRegistry.register`` takes it.
    kind : str
        ``before``, ``after``, ``around`` or ``replace`` of ``HookRegistry``; ``assigned`` for a
        name that is set without it; ``uses`` for one that is only called or read.
    why : str
        One sentence: what the hook is for.
    params : tuple of str
        Parameter names that the hook relies on; each must still be in the target's signature.
    attributes : tuple of str
        For a class: names of methods and fields that are called or read on its instances.
    checked_with : str
        SGLang release this row was run with.
    """

    path: str
    kind: str
    why: str
    params: tuple[str, ...] = field(default=())
    attributes: tuple[str, ...] = field(default=())
    checked_with: str = CHECKED_WITH

    def __post_init__(self) -> None:
        allowed = ("before", "after", "around", "replace", "assigned", "uses")
        if self.kind not in allowed:
            raise ValueError(f"HookTarget.kind is {self.kind!r}; allowed are {', '.join(allowed)}.")


_TARGETS: dict[tuple[str, str], HookTarget] = {}


def add_targets(rows: Iterable[HookTarget]) -> None:
    """Add rows to the table; adding the same row twice changes nothing."""
    for row in rows:
        _TARGETS[row.path, row.kind] = row


def add_hooks(hooks: Iterable[tuple[HookTarget, Callable[..., Any]]]) -> None:
    """Add rows to the table and register the hook of each with SGLang, which applies them later.

    Parameters
    ----------
    hooks : iterable of (HookTarget, callable)
        Per row the callable that ``HookRegistry`` calls; the row's ``kind`` says when.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    pairs = list(hooks)
    add_targets(row for row, _ in pairs)
    for row, hook in pairs:
        HookRegistry.register(row.path, hook, HookType(row.kind))


def targets() -> tuple[HookTarget, ...]:
    """Return every row, in the order in which they were added."""
    return tuple(_TARGETS.values())


def _fault(row: HookTarget) -> str | None:
    try:
        found = pkgutil.resolve_name(row.path)
    except (ImportError, AttributeError) as error:
        return f"{row.path} ({error})"
    if row.attributes:
        known = _names_of(found)
        gone = [name for name in row.attributes if name not in known]
        if gone:
            return f"{row.path} lost {', '.join(gone)}"
    if not row.params:
        return None
    try:
        have = inspect.signature(found).parameters
    except (TypeError, ValueError) as error:
        return f"{row.path} has no readable signature ({error})"
    # A wrapper that SGLang made keeps the signature through functools.wraps.
    missing = [name for name in row.params if name not in have]
    return f"{row.path} lost the parameter(s) {', '.join(missing)}" if missing else None


def _names_of(kind: type) -> set[str]:
    """Names that instances of a class may have: its members, and all that its own methods mention.

    Fields are set in ``__init__``, so a class does not list them; reading its source would take seconds.
    """
    names = set(dir(kind))
    for base in kind.__mro__:
        # An enumeration hides its methods from `dir`.
        names.update(vars(base), inspect.get_annotations(base))
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member) if callable(member) else None, "__code__", None)
            names.update(code.co_names if code else ())
    return names


def verify_targets(rows: Iterable[HookTarget] | None = None) -> None:
    """Resolve rows in this process.

    Parameters
    ----------
    rows : iterable of HookTarget, optional
        The rows to check; None for the whole table.

    Raises
    ------
    PluginRefused
        Naming each target that is gone or changed, and the SGLang release to install.
    """
    faults = [text for row in rows or targets() if (text := _fault(row))]
    if faults:
        from importlib.metadata import version

        raise PluginRefused(
            f"rag-pipeline cannot hook SGLang {version('sglang')}: {'; '.join(faults)}. "
            f"It is written for SGLang {CHECKED_WITH}: pip install sglang=={CHECKED_WITH}, "
            "or run without the plugin (RAG_PIPELINE_PLUGIN=off)."
        )


def hooked_targets() -> list[HookTarget]:
    """Rows whose hook SGLang's ``HookRegistry`` applies."""
    return [row for row in targets() if row.kind not in ("assigned", "uses")]


def unapplied_targets() -> list[str]:
    """Paths that are in the table but that SGLang has not patched in this process.

    Empty in a healthy process once ``load_plugins`` has returned.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    patched = HookRegistry._patched
    return [row.path for row in hooked_targets() if row.path not in patched]


@contextmanager
def fail_hard() -> Iterator[None]:
    """Turn any ``Exception`` of the body into :class:`PluginRefused`."""
    try:
        yield
    except Exception as error:
        raise PluginRefused(
            f"rag-pipeline's SGLang plugin failed to register: {type(error).__name__}: {error}"
        ) from error
