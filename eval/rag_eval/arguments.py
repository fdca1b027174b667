"""Argument parsing of the evaluation commands: a mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

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


def parse_config(
    parser: argparse.ArgumentParser, kind: type[Config], words: Sequence[str] | None
) -> tuple[Config, bool]:
    """Read a config that has one option per field, and whether ``--json`` was given.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Gets the options; a config that refuses its values ends the program as a bad option does.
    kind : type
        A dataclass whose fields are whole numbers or texts and all have a default.
    words : sequence of str or None
        The command line without the program; None for that of the process.
    """
    from rag_eval.errors import EvalError

    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for field in dataclasses.fields(kind):
        is_number = isinstance(field.default, int)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int if is_number else str,
            default=field.default,
            metavar="N" if is_number else None,
        )
    given = vars(parser.parse_args(words))
    as_json: bool = given.pop("json")
    try:
        return kind(**given), as_json
    except EvalError as error:
        parser.error(str(error))


def engine_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``NAME=JSON`` words into arguments of ``sglang.Engine``.

    Raises
    ------
    EvalError
        A word of another form.
    """
    from rag_eval.errors import EvalError

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            equals = ""
        if not equals or not name:
            raise EvalError(f"--engine-arg {pair!r} is not NAME=JSON; write page_size=16")
    return found
