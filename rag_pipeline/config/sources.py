"""What files and environment say, as nested dictionaries, before anything is checked.

Imports neither pydantic nor a TOML reader: the command line asks :func:`anything_set` first, and
most runs end there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rag_pipeline.errors import RagPipelineError

FILE_NAME = "rag-pipeline.toml"
"""Name of the file in the working folder, and in the user's configuration folder."""

CONFIG_VARIABLE = "RAG_PIPELINE_CONFIG"
"""Environment variable: a file in place of the working folder's, or ``off`` for no file at all."""

NO_FILES = "off"
PREFIX = "RAG_PIPELINE_"
FUSION_VARIABLE = "RAG_PIPELINE_FUSION"

VERBOSE_VARIABLE = "RAG_PIPELINE_VERBOSE"
"""Environment variable: ``1`` lets all messages and bars of the engine through, as ``--verbose`` does."""

_NOT_SETTINGS = frozenset(
    {
        CONFIG_VARIABLE,
        VERBOSE_VARIABLE,
        "RAG_PIPELINE_API_KEY",
        "RAG_PIPELINE_ADMIN_API_KEY",
        "RAG_PIPELINE_FAULT_FILE",
        "RAG_PIPELINE_FORK_SERVER_OWNER",
        "RAG_PIPELINE_INTEGRITY",
    }
)
"""Variables of the prefix that are no settings: where to look, how much to say, the server's keys, which
nothing shows, one between our processes, one of tests."""

_TEST_PREFIX = "RAG_PIPELINE_TEST_"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a value came from.

    Attributes
    ----------
    kind : str
        ``default``, ``file`` or ``environment``.
    where : str
        Path of the file or name of the variable; empty for a default.
    """

    kind: Literal["default", "file", "environment"]
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.where}".strip()


def user_file() -> Path:
    """Path of the user's own file; it need not exist."""
    from platformdirs import user_config_path

    return user_config_path("rag-pipeline", appauthor=False) / FILE_NAME


def files_to_read(given: Path | None = None) -> list[Path]:
    """Files that count, weakest first.

    Parameters
    ----------
    given : Path, optional
        What ``--config`` names; ``$RAG_PIPELINE_CONFIG`` where None.

    Raises
    ------
    RagPipelineError
        A file was named and is not there.
    """
    named = str(given) if given is not None else os.environ.get(CONFIG_VARIABLE, "").strip()
    if named == NO_FILES:
        return []
    candidates = [user_file()]
    if named:
        chosen = Path(named).expanduser().absolute()
        if not chosen.is_file():
            raise RagPipelineError(
                f"no settings file {chosen}; give an existing file, or {NO_FILES!r} to read none"
            )
        return [*(path for path in candidates if path.is_file()), chosen]
    candidates.append(Path.cwd() / FILE_NAME)
    return [path for path in candidates if path.is_file()]


def environment_names(environ: Mapping[str, str]) -> Iterator[str]:
    """Names of the variables that are meant as settings and are not empty."""
    for name in sorted(environ):
        ours = name.startswith(PREFIX) and not name.startswith(_TEST_PREFIX)
        if ours and name not in _NOT_SETTINGS and environ[name].strip():
            yield name


def anything_set(given: Path | None = None) -> bool:
    """Whether any file or variable is there to be read; cheap."""
    return bool(files_to_read(given)) or any(environment_names(os.environ))


def read_file(path: Path) -> dict[str, Any]:
    """Read a TOML file; a fault is one line.

    Raises
    ------
    RagPipelineError
        The file cannot be read, or is not TOML.
    """
    import tomllib

    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RagPipelineError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RagPipelineError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise RagPipelineError(f"{path} is not TOML: {error}") from None


def variable_of(key: str) -> str:
    """Environment variable of a dotted key (``ask.top_k`` is ``RAG_PIPELINE_ASK_TOP_K``).

    The keys of ``fusion`` share one variable, which holds JSON: SGLang's processes read it too, and
    would not see others.
    """
    if key.startswith("fusion."):
        return FUSION_VARIABLE
    return PREFIX + key.replace(".", "_").upper()
