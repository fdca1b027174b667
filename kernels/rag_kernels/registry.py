"""Implementations by name: built in, registered by a call, or offered by another distribution."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing, each loaded when it is first asked for.

    Parameters
    ----------
    kind : str
        What the names stand for, in messages: ``attention kernel``.
    group : str
        Entry-point group in which an installed distribution offers its own::

            [project.entry-points."rag_pipeline.attention_kernels"]
            mine = "my_package:MyKernel"
    built_in : mapping of str to str
        ``package.module:attribute`` by name, in the order in which they are preferred.

    Notes
    -----
    A name has one owner: neither a call nor a distribution may take one that is there.
    """

    def __init__(self, kind: str, group: str, built_in: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._places = dict(built_in)
        self._values: dict[str, T] = {}
        self._offered: dict[str, EntryPoint] | None = None

    def register(self, name: str, value: T) -> None:
        """Add one in this process.

        Raises
        ------
        ValueError
            The name is taken, or is none.
        """
        if not name or not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"{self.kind} {name!r}: give a name of letters, digits, '_' and '-'.")
        if name in self.names():
            raise ValueError(f"{self.kind} {name!r} is there already; choose another name.")
        self._values[name] = value

    def unregister(self, name: str) -> None:
        """Take back what :meth:`register` added; for tests."""
        self._values.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """All names, the built-in ones first."""
        return tuple(dict.fromkeys((*self._places, *self._values, *self._offers())))

    def get(self, name: str) -> T:
        """Return what a name stands for.

        Raises
        ------
        ValueError
            One line with the names that are known.
        """
        if name not in self._values:
            if name in self._places:
                module, _, attribute = self._places[name].partition(":")
                self._values[name] = getattr(import_module(module), attribute)
            elif name in self._offers():
                self._values[name] = self._load(self._offers()[name])
            else:
                raise ValueError(
                    f"{self.kind} {name!r} is not known; choose one of {', '.join(self.names())}."
                )
        return self._values[name]

    def _load(self, offer: EntryPoint) -> Any:
        try:
            return offer.load()
        except Exception as error:
            whose = offer.dist.name if offer.dist is not None else "a distribution"
            raise ValueError(
                f"{self.kind} {offer.name!r} of {whose} cannot be loaded ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); mend {offer.value} or uninstall it."
            ) from error

    def _offers(self) -> dict[str, EntryPoint]:
        if self._offered is None:
            found = entry_points(group=self.group)
            self._offered = {one.name: one for one in found if one.name not in self._places}
        return self._offered
