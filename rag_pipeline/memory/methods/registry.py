"""Memory methods by name."""

from __future__ import annotations

from rag_kernels import Registry
from rag_pipeline.errors import RagPipelineError
from rag_pipeline.memory.config import MemoryConfig
from rag_pipeline.memory.methods.base import MemoryMethod

_HERE = "rag_pipeline.memory.methods"

MEMORY_METHODS: Registry[type[MemoryMethod]] = Registry(
    "memory method",
    "rag_pipeline.memory_methods",
    {
        "epicache": f"{_HERE}.epicache:EpiCache",
        "epicache-shared": f"{_HERE}.epicache_shared:SharedEpiCache",
        "snapkv": f"{_HERE}.snapkv:SnapKV",
        "keydiff": f"{_HERE}.keydiff:KeyDiff",
        "kvzip": f"{_HERE}.kvzip:KVzip",
        "streaming": f"{_HERE}.streaming:Streaming",
        "retrieval": f"{_HERE}.retrieval:TurnRetrieval",
        "full": f"{_HERE}.full:FullHistory",
    },
    base=MemoryMethod,
    reserved=("off", "none"),
)
"""Classes of :class:`.MemoryMethod`; :attr:`.MemoryConfig.method` names one."""


def create_method(config: MemoryConfig) -> MemoryMethod:
    """Make the method that a configuration names.

    Raises
    ------
    RagPipelineError
        A name that is not known, or options that the method does not have.
    """
    name, _, options = config.method.partition(":")
    try:
        found = MEMORY_METHODS.get(name.strip())
    except ValueError as error:
        raise RagPipelineError(str(error)) from None
    return found(config, options.strip())
