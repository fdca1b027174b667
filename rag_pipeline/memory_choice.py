"""What a caller says of the memory of a long conversation: one reader for the command line, the server and LangChain.

``"off"``, the name of a method (``"epicache"``), or an object::

    {"method": "epicache", "budget_tokens": 2048, "episodes": 4}

The methods and their settings are those of :class:`rag_pipeline.memory.MemoryConfig`, which checks them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rag_pipeline.errors import RagPipelineError

if TYPE_CHECKING:
    from rag_pipeline.memory import MemoryConfig

OFF = "off"
"""A conversation is answered from all of it."""

DEFAULT_METHOD = "epicache"
"""Of an object that names none."""

FIELDS = ("method", "budget_tokens", "episodes", "block_tokens")
"""What a caller may say."""

MemoryWish = str | Mapping[str, object]
"""``"off"``, a method's name, or an object of :data:`FIELDS`."""


def choose_memory(
    asked: MemoryWish | None, default: MemoryConfig | None = None
) -> MemoryConfig | None:
    """Read what a caller says.

    Parameters
    ----------
    asked : str, mapping or None
        None takes the default.
    default : MemoryConfig or None
        In force where nothing is said; its settings stay where only some are named. None for off.

    Returns
    -------
    MemoryConfig or None
        None for off.

    Raises
    ------
    RagPipelineError
        One line: an unknown method or field, or a value that is not allowed.
    """
    if asked is None:
        return default
    given = {"method": asked} if isinstance(asked, str) else asked
    if not isinstance(given, Mapping):
        raise RagPipelineError(
            f"memory is {asked!r:.80}; give {OFF}, a method such as {DEFAULT_METHOD}, or an object of "
            f"{', '.join(FIELDS)}"
        )
    for name in given:
        if name not in FIELDS:
            raise RagPipelineError(
                f"memory has the field {name!r:.40}; allowed are {', '.join(FIELDS)}"
            )
    method = given.get("method", default.method if default is not None else DEFAULT_METHOD)
    if method == OFF:
        return None
    from rag_pipeline.memory import MemoryConfig

    base = default or MemoryConfig()
    return dataclasses.replace(base, **{**given, "method": method})  # type: ignore[arg-type]
