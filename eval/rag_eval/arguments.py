"""Argument parsing of the evaluation commands: a mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

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
