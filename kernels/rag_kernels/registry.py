"""Implementations by name: built in, registered by a call, or offered by another distribution."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
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
    base : type, optional
        Class that what a name stands for must be a subclass of; anything else is refused.
    reserved : collection of str
        Names that mean something else where one of these is written, such as ``auto``.

    Notes
    -----
    A name has one owner: a call may take none that is there, a distribution none that is built in or registered. Of
    a name that two distributions offer neither is loaded: nobody could say which one answered.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        built_in: Mapping[str, str],
        *,
        base: type[Any] | None = None,
        reserved: Collection[str] = (),
    ) -> None:
        self.kind = kind
        self.group = group
        self._base = base
        self._reserved = frozenset(reserved)
        self._places = dict(built_in)
        self._registered: dict[str, T] = {}
        self._loaded: dict[str, T] = {}

    def register(self, name: str, value: T) -> None:
        """Add one in this process.

        Raises
        ------
        ValueError
            The name is taken, or is none, or the value is nothing of the kind.
        """
        if not _is_name(name):
            raise ValueError(f"{self.kind} {name!r}: give a name of letters, digits, '_' and '-'.")
        if name in self._reserved:
            raise ValueError(f"{self.kind} {name!r} has a meaning already; choose another name.")
        if name in self.names():
            raise ValueError(f"{self.kind} {name!r} is there already; choose another name.")
        self._registered[name] = self._checked(name, value)

    def unregister(self, name: str) -> None:
        """Take back what :meth:`register` added; for tests."""
        self._registered.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """All names: the built-in ones, those registered, those offered."""
        return tuple(dict.fromkeys((*self._places, *self._registered, *self._offers)))

    def get(self, name: str) -> T:
        """Return what a name stands for.

        Raises
        ------
        ValueError
            One line: the names that are known, or why what another distribution offers cannot be used.
        """
        if name in self._registered:
            return self._registered[name]
        if name not in self._loaded:
            if name in self._places:
                module, _, attribute = self._places[name].partition(":")
                self._loaded[name] = getattr(import_module(module), attribute)
            elif name in self._offers:
                self._loaded[name] = self._load(name)
            else:
                raise ValueError(
                    f"{self.kind} {name!r} is not known; choose one of {', '.join(self.names())}."
                )
        return self._loaded[name]

    def _load(self, name: str) -> T:
        offers = self._offers[name]
        if len(offers) > 1:
            owners = " and ".join(sorted(map(_owner, offers)))
            raise ValueError(f"{self.kind} {name!r} is offered by {owners}; uninstall all but one.")
        (offer,) = offers
        try:
            value = offer.load()
        except (Exception, SystemExit) as error:  # a module of others may end the process on import
            raise ValueError(
                f"{self.kind} {name!r} of {_owner(offer)} cannot be loaded ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); mend {offer.value} or uninstall it."
            ) from error
        return self._checked(name, value)

    def _checked(self, name: str, value: Any) -> T:
        base = self._base
        if base is not None and not (isinstance(value, type) and issubclass(value, base)):
            raise ValueError(
                f"{self.kind} {name!r} is {value!r}; give a subclass of {base.__module__}.{base.__name__}."
            )
        found: T = value
        return found

    @functools.cached_property
    def _offers(self) -> dict[str, list[EntryPoint]]:
        """Entry points by name, read once per process; those that are no names or mean something else are left out."""
        offers: dict[str, list[EntryPoint]] = {}
        for one in entry_points(group=self.group):
            if _is_name(one.name) and one.name not in {*self._places, *self._reserved}:
                offers.setdefault(one.name, []).append(one)
        return offers


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.replace("_", "").replace("-", "").isalnum()


def _owner(offer: EntryPoint) -> str:
    return offer.dist.name if offer.dist is not None else "a distribution"
