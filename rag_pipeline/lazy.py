"""Packages whose public names are loaded on first use (PEP 562), so that importing one costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and the ``__dir__`` of a package.

    Parameters
    ----------
    package : str
        Full name of the package, its ``__name__``.
    homes : mapping of str to str
        Module below the package per public name; ``module:name`` where the module calls it otherwise.

    Returns
    -------
    tuple
        ``__getattr__``, which imports the module and keeps the value in the package, and
        ``__dir__``, which lists the package's ``__all__``.

    Raises
    ------
    AttributeError
        By ``__getattr__``, for a name that is not in `homes`.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, original = homes[name].partition(":")
        value = getattr(import_module(f"{package}.{module}"), original or name)
        # Importing a module binds it in its package; a public name that is spelled alike must win.
        setattr(sys.modules[package], name, value)
        return value

    def public() -> list[str]:
        return sorted(sys.modules[package].__all__)

    return load, public
