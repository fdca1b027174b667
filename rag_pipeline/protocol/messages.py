"""What a backend is asked and what it hands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.protocol.fusion_request import LEFT_ALONE, FusionRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How the answer is decoded; the default is greedy.

    Parameters
    ----------
    max_new_tokens : int
        Most tokens of the answer, at least 1.
    temperature : float
        0 is greedy.
    top_p : float
        Nucleus mass in (0, 1].
    stop : tuple of str
        Strings that end the answer; not part of it.
    repetition_penalty : float or None
        In (0, 2]; 1 is none. None takes what the model's ``generation_config.json`` names.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        def refuse(name: str, value: object, allowed: str) -> None:
            raise RagPipelineError(f"{name} is {value!r}; it must be {allowed}")

        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            refuse("max_new_tokens", self.max_new_tokens, "a whole number, at least 1")
        if self.max_new_tokens < 1:
            refuse("max_new_tokens", self.max_new_tokens, "at least 1")
        if not self.temperature >= 0:
            refuse("temperature", self.temperature, "0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            refuse("top_p", self.top_p, "above 0 and at most 1")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty <= 2:
            refuse("repetition_penalty", self.repetition_penalty, "above 0 and at most 2")

    def filled(self, *, repetition_penalty: float, stop: str) -> SamplingOptions:
        """Return these options with the model's own penalty where none is given, and one more stop."""
        given = self.repetition_penalty
        return replace(
            self,
            repetition_penalty=repetition_penalty if given is None else given,
            stop=(*self.stop, stop),
        )

    def to_params(self) -> dict[str, Any]:
        """Write the sampling parameters as SGLang's engine and ``/generate`` take them."""
        params: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "repetition_penalty": 1.0
            if self.repetition_penalty is None
            else self.repetition_penalty,
        }
        if self.stop:
            params["stop"] = list(self.stop)
        return params


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt for a backend.

    Parameters
    ----------
    input_ids : tuple of int
        Token ids of the prompt.
    fusion : FusionRequest
        What it asks of fusion; by default to be left alone.
    sampling : SamplingOptions
        How to decode.
    """

    input_ids: tuple[int, ...]
    fusion: FusionRequest = LEFT_ALONE
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationPiece:
    """What a backend hands out while it generates.

    Parameters
    ----------
    text : str
        Text that is new since the piece before.
    meta_info : mapping
        The engine's report on the request so far (token counts, finish reason).
    """

    text: str
    meta_info: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of one answer; the four kinds of prompt tokens add up to `prompt_tokens`.

    Parameters
    ----------
    prompt_tokens : int
        Tokens of the whole prompt.
    exact_prefix_tokens : int
        Served by the radix tree (exact).
    reused_tokens : int
        Served from the chunk cache without recomputation (approximate).
    recomputed_tokens : int
        Found in the chunk cache and recomputed in place.
    fresh_tokens : int
        Computed by ordinary prefill.
    completion_tokens : int
        Tokens of the answer.
    """

    prompt_tokens: int
    exact_prefix_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    fresh_tokens: int
    completion_tokens: int

    def describe(self) -> str:
        """What happened to the prompt, in one line for people."""
        return (
            f"{self.prompt_tokens} tokens: {self.exact_prefix_tokens} exact prefix, {self.reused_tokens} reused, "
            f"{self.recomputed_tokens} recomputed, {self.fresh_tokens} fresh"
        )
