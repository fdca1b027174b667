"""Argument parsing of the evaluation commands: a mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import sys
import textwrap
from collections.abc import Container, Mapping, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_type_hints

from rag_eval.errors import EvalError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

_EXAMPLES = {"--engine-arg": "page_size=16", "--memory-arg": "episodes=4"}

INTERRUPTED = 130
"""Exit code of a measurement that was interrupted; what it had measured is printed."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that shows defaults and says no in one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print the mistake and where the allowed options are listed; exit with 2."""
        line = " ".join(message.split())
        sys.stderr.write(f"error: {line}; `{self.prog} --help` lists what is allowed\n")
        raise SystemExit(2)


def add_fields(
    parser: argparse.ArgumentParser,
    kind: type[Any],
    texts: Mapping[str, str] | None = None,
    *,
    only: Container[str] | None = None,
) -> None:
    """Add an option for each field of a config, and of the configs that it holds.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Gets the options; a field that has an option there already is left as it is.
    kind : type
        A dataclass. Fields of ``int``, ``float`` and ``str``, also with ``None``, become options with
        the field's default; fields of another kind are left out.
    texts : mapping of str to str, optional
        Help text by name of the field; the string below the field in the class when not given.
    only : container of str, optional
        Names of the fields that get an option; all when not given.
    """
    hints = get_type_hints(kind)
    taken = {action.dest for action in parser._actions}
    own = _texts_below(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            add_fields(parser, hint, texts, only=only)
            continue
        plain = get_args(hint)[0] if isinstance(hint, UnionType) else hint
        if field.name in taken or (only is not None and field.name not in only):
            continue
        if plain not in (int, float, str):
            continue
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=plain,
            default=field.default,
            metavar=None if plain is str else "N",
            help=(own | dict(texts or {})).get(field.name, "(default: %(default)s)"),
        )


def _texts_below(kind: type[Any]) -> dict[str, str]:
    """Strings that stand below the fields of a class in its source, as help texts."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(tree.body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(words))),
            ):
                found[name] = words.rstrip(".").replace("`", "").replace("%", "%%")
    return found


def build_config(kind: type[Config], given: Mapping[str, Any]) -> Config:
    """Make a config of parsed options; what was not given keeps the field's default.

    Parameters
    ----------
    kind : type
        A dataclass; a config that it holds is made of the same options.
    given : mapping
        Options by name of the field; the words of ``--engine-arg`` are read here. None stands for an
        option that was not given.

    Raises
    ------
    EvalError
        The config refuses its values, or an engine argument is no ``NAME=JSON``.
    """
    hints, values = get_type_hints(kind), dict(given)
    if "engine_args" in given:
        values["engine_args"] = engine_arguments(given["engine_args"])
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = build_config(hints[field.name], given)
    own = {field.name: values.get(field.name) for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in own.items() if value is not None})


def parse_config(
    parser: argparse.ArgumentParser,
    kind: type[Config],
    words: Sequence[str] | None,
) -> tuple[Config, argparse.Namespace]:
    """Read a config by an option for each field, and the options that the parser has besides.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Gets the options (:func:`add_fields`) and ``--json``; a config that refuses its values ends
        the program as a bad option does.
    kind : type
        The config's dataclass.
    words : sequence of str or None
        The command line without the program; None for that of the process.
    """
    add_fields(parser, kind)
    add_json_option(parser)
    given = parser.parse_args(words)
    try:
        return build_config(kind, vars(given)), given
    except EvalError as error:
        parser.error(str(error))


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, which every command of evaluation has."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )


def add_engine_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--engine-arg NAME=JSON``, which may be repeated; it is the field ``engine_args``."""
    parser.add_argument(
        "--engine-arg",
        dest="engine_args",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="sglang argument",
    )


def engine_arguments(pairs: Sequence[str], *, option: str = "--engine-arg") -> dict[str, Any]:
    """Read ``NAME=JSON`` words of an option, such as arguments of ``sglang.Engine``.

    Raises
    ------
    EvalError
        A word of another form.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            equals = ""
        if not equals or not name:
            raise EvalError(f"{option} {pair!r} is not NAME=JSON; write {_EXAMPLES[option]}")
    return found


def require_at_least(config: Any, least: int, *names: str) -> None:
    """Refuse a config in which a number is too small.

    Raises
    ------
    EvalError
        The field, its value, and what is allowed.
    """
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise EvalError(f"{name} is {value}; it must be {least} or more")
