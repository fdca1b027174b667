"""What a backend promises."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Protocol

from rag_pipeline.protocol import GenerationPiece, GenerationRequest


class Backend(Protocol):
    """Generates text from token ids. Safe to use from several threads and tasks at once."""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    def generate(self, request: GenerationRequest) -> Generator[GenerationPiece, None, None]:
        """Yield pieces as they come; closing the generator aborts the request in the engine."""
        ...

    def agenerate(self, request: GenerationRequest) -> AsyncGenerator[GenerationPiece, None]:
        """Yield as :meth:`generate` does, without blocking the event loop."""
        ...

    def close(self) -> None:
        """Release what the backend itself started; a second call does nothing."""
        ...
