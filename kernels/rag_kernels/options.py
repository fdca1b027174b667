"""Options of what a registry makes: the fields of its configuration, each checked by its type."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, Union

from rag_kernels.registry import Registry

T = TypeVar("T")

_LARGEST = 2**53
"""Largest number read from a text; above it whole numbers are not told apart in JSON, and tensors overflow."""


def make_config(
    owner: str, config_type: type[T], given: Mapping[str, Any], *, from_text: bool = False
) -> T:
    """Make a configuration from options that a user or a client named.

    Parameters
    ----------
    owner : str
        Whose options, at the head of a refusal: ``policy 'query'``.
    config_type : type
        A dataclass whose fields are numbers, truth values, texts or ``Literal``, some of them optional.
    given : mapping of str to object
        Values by name.
    from_text : bool
        Whether the values are texts to be read, rather than values of the right type.

    Raises
    ------
    ValueError
        An unknown option, a wrong type, or what the configuration itself refuses; one line.
    """
    hints = typing.get_type_hints(config_type)
    known = {field.name: hints[field.name] for field in fields(config_type)}  # type: ignore[arg-type]
    values = {}
    for key, value in given.items():
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise ValueError(f"{owner} has no option {key!r}; allowed: {allowed}.")
        for kind in _kinds(known[key]):
            found = _read(value, kind) if from_text else value
            if _fits(found, kind):
                values[key] = float(found) if kind is float else found
                break
        else:
            raise ValueError(
                f"{owner}: option {key} is {value!r}; expected {_spelled(known[key])}."
            )
    return config_type(**values)


def create_named(registry: Registry[type[T]], text: str) -> T:
    """Make what a text names: ``NAME`` or ``NAME:OPTION=VALUE+OPTION=VALUE``.

    Parameters
    ----------
    registry : Registry
        Classes by name; each takes an instance of its own ``config_type``, the dataclass of its options.
    text : str
        A name in it, with options behind a colon.

    Raises
    ------
    ValueError
        An unknown name or option, an option without a value or given twice, a wrong type or value; one line that says
        what is allowed.
    """
    name, _, tail = text.partition(":")
    options: dict[str, str] = {}
    for pair in tail.split("+") if tail else ():
        key, equals, value = pair.partition("=")
        if not equals or key in options:
            raise ValueError(
                f"{registry.kind} {text!r}: {pair!r} is not OPTION=VALUE, each once; "
                f"write {name}:OPTION=VALUE+OPTION=VALUE."
            )
        options[key] = value
    made: Any = registry.get(name)
    owner = f"{registry.kind} {name!r}"
    found: T = made(make_config(owner, made.config_type, options, from_text=True))
    return found


def _kinds(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return kind in (int, bool, str, type(None)) and type(value) is kind


def _read(text: str, kind: Any) -> Any:
    """Value of a text; the text itself where it is none of that kind, which then does not fit."""
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind in (int, float):
        try:
            value: int | float = kind(text)
        except ValueError:
            return text
        return value if abs(value) <= _LARGEST else text  # nan is neither
    return text


def _spelled(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if hint is bool:
        return "true or false"
    return hint.__name__ if isinstance(hint, type) else str(hint)
