"""From ``NAME`` or ``NAME:OPTION=VALUE+OPTION=VALUE`` to an attention method."""

from __future__ import annotations

import typing
from dataclasses import fields
from typing import Any

from rag_kernels.registry import Registry
from rag_kernels.sparse.base import AttentionMethod

ATTENTION_METHODS: Registry[type[AttentionMethod]] = Registry(
    "attention method",
    "rag_pipeline.attention_methods",
    {"dense": "rag_kernels.sparse.dense:DenseAttention"},
    base=AttentionMethod,
)
"""Methods by name. A client names one in its request; each process that reads it must know it."""


_LARGEST = 2**53
"""Largest number of an option; above it whole numbers are not told apart in JSON, and tensors overflow."""


def create_attention_method(text: str) -> AttentionMethod:
    """Make a method.

    Parameters
    ----------
    text : str
        A name in :data:`ATTENTION_METHODS`, with options behind a colon: ``mine:blocks=4+sink=true``.

    Raises
    ------
    ValueError
        An unknown name or option, a wrong type or value; one line that says what is allowed.
    """
    name, _, tail = text.partition(":")
    method = ATTENTION_METHODS.get(name)
    hints = typing.get_type_hints(method.config_type)
    known = {field.name: hints[field.name] for field in fields(method.config_type)}
    options: dict[str, Any] = {}
    for pair in tail.split("+") if tail else ():
        key, equals, value = pair.partition("=")
        if not equals or key in options:
            raise ValueError(
                f"attention method {text!r}: {pair!r} is not OPTION=VALUE, each once; "
                f"write {name}:OPTION=VALUE+OPTION=VALUE."
            )
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise ValueError(
                f"attention method {name!r} has no option {key!r}; allowed: {allowed}."
            )
        options[key] = _read(name, key, value, known[key])
    return method(method.config_type(**options))


def _read(name: str, key: str, text: str, kind: Any) -> bool | int | float | str:
    """Read one option of a plain type."""
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is str:
        return text
    if kind in (int, float):
        try:
            value: int | float = kind(text)
            if abs(value) <= _LARGEST:  # neither is true of nan
                return value
        except ValueError:
            pass
    spelled = "true or false" if kind is bool else getattr(kind, "__name__", kind)
    raise ValueError(f"attention method {name!r}: option {key} is {text!r}; expected {spelled}.")
