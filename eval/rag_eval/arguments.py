"""Argument parsing of the evaluation commands: a mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn


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
