"""One run of the command line, and the one place where a user's mistake becomes one line."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence

import typer

from rag_pipeline.cli.app import app
from rag_pipeline.interrupts import one_interrupt

# typer carries its own copy of click and exports only the leaves; the base of `BadParameter` is
# what every parsing mistake (unknown option, missing argument, bad value) is an instance of.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

VERBOSE = "--verbose"

INTERRUPTED = 130
"""Exit code of a command that was interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Words after the program's name; ``None`` takes ``sys.argv``.

    Returns
    -------
    int
        0 on success, 1 for a fault in the input, 2 for a mistake in the options, 130 on Ctrl-C or
        SIGTERM.
    """
    command = typer.main.get_command(app)
    # Progress is shown by this program; the bars that libraries draw, in child processes too, are not.
    os.environ.setdefault("TQDM_DISABLE", "1")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if VERBOSE in words:  # stands behind the command as well as before it
        words = [VERBOSE, *(word for word in words if word != VERBOSE)]
    try:
        with one_interrupt():
            result = command.main(
                args=words or ["--help"],
                prog_name="rag-pipeline",
                standalone_mode=False,
                obj=words,  # the app's callback looks there for a call for help
            )
    except _UsageError as error:
        # Formatted by hand: typer's own rendering is a box of several lines.
        return _fail(_usage_line(error), code=2)
    except SystemExit as stop:  # from the evaluation's parser, which has said why
        return stop.code if isinstance(stop.code, int) else 1
    except (typer.Abort, KeyboardInterrupt):
        result = INTERRUPTED
    except _user_errors() as error:
        return _fail(str(error), code=1)
    except OSError as error:
        # What a command expects of the disk is refused where it is known; this is all the rest.
        _forget_output()
        return _fail(_disk_line(error), code=1)
    # typer turns an interrupt of a command into this code, without a word.
    if result == INTERRUPTED:
        return _fail("interrupted; what was already written is kept", code=INTERRUPTED)
    return result if isinstance(result, int) else 0


def _user_errors() -> tuple[type[Exception], ...]:
    from rag_pipeline.errors import RagPipelineError
    from retrievers.errors import RetrievalError

    return (RagPipelineError, RetrievalError)


def _disk_line(error: OSError) -> str:
    """Say what the system refused, on which file, and what may help."""
    advice = {
        errno.ENOSPC: "free some space and try again",
        errno.EDQUOT: "free some space, or raise the quota, and try again",
        errno.EROFS: "name a place that can be written",
        errno.EACCES: "name a place that you may use",
        errno.EPERM: "name a place that you may use",
        errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    }.get(error.errno or 0, "check the path and the disk")
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{where}{error.strerror or error}; {advice}"


def _forget_output() -> None:
    """Drop what cannot be printed: at its end Python would try again, and print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), stream.fileno())


def _usage_line(error: Exception) -> str:
    """Say what was wrong with the words given, and where the allowed ones are listed."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "rag-pipeline"
    text: str = error.format_message()  # type: ignore[attr-defined]
    return f"{text.rstrip('.')}; `{where} --help` lists what is allowed"


def _fail(message: str, *, code: int) -> int:
    line = " ".join(message.split())
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {line}\n")
        sys.stderr.flush()
    return code
