"""What is asked of a conversion, and whether a model's shape allows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rag_pipeline.errors import RagPipelineError

if TYPE_CHECKING:
    from rag_pipeline.conversion.source import SourceShape

DType = Literal["auto", "float32", "bfloat16"]


class ConversionError(RagPipelineError):
    """A model, a size or a text that cannot be converted; one line that says what to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionConfig:
    """Sizes of the latent form, and how it is found.

    Parameters
    ----------
    rope : int
        Numbers per token that keep their position (``qk_rope_head_dim``).
    latent : int
        Numbers per token of the joint latent of the remaining keys and the values (``kv_lora_rank``).
    pad_heads_to : int, optional
        Query heads of the checkpoint; heads of zeros are added, for tensor parallelism.
    calibration_tokens : int
        Most tokens that are calibrated on.
    held_out_tokens : int
        Most tokens of each text that perplexity is measured on.
    window : int
        Tokens that are computed together, in calibration and in perplexity.
    ridge : float
        How strongly the refitted output projection is held to the original, relative to its inputs' energy;
        0 holds it only as far as the equations must be solvable.
    refit : bool
        Whether output projections are refitted at all.
    dtype : {'auto', 'float32', 'bfloat16'}
        Of the written weights; ``auto`` is the model's own, bfloat16 where that is float16.
    """

    rope: int
    latent: int
    pad_heads_to: int | None = None
    calibration_tokens: int = 64 * 512
    held_out_tokens: int = 8 * 512
    window: int = 512
    ridge: float = 0.03
    refit: bool = True
    dtype: DType = "auto"

    def __post_init__(self) -> None:
        for name in ("rope", "latent", "calibration_tokens", "held_out_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ConversionError(f"{name} is {value}; it must be at least 1")
        if self.window < 16:
            raise ConversionError(f"window is {self.window} tokens; it must be at least 16")
        if not 0 <= self.ridge < float("inf"):
            raise ConversionError(f"ridge is {self.ridge}; it must be at least 0, and finite")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConversionError(f"dtype is {self.dtype!r}; allowed: auto, float32, bfloat16")

    def check(self, shape: SourceShape) -> None:
        """Refuse sizes that the model or a stock checkpoint does not allow.

        Raises
        ------
        ConversionError
            One line: the size, what is allowed, what to give.
        """
        head, width = shape.head_dim, shape.kv_width
        for name, value, allowed in (
            ("rope", self.rope, str(head)),
            ("latent", self.latent, _multiples(head, 2 * width - head)),
        ):
            if value % head:
                raise ConversionError(
                    f"{name} is {value}; it must be a multiple of the model's head dimension {head}: give {allowed}"
                )
        if self.rope > width:
            raise ConversionError(f"rope is {self.rope}; the model's keys have {width} numbers")
        if self.rope > head:
            raise ConversionError(
                f"rope is {self.rope}; a stock checkpoint has each of RoPE's frequencies once, so give {head}"
            )
        if self.latent > (most := 2 * width - self.rope):
            raise ConversionError(
                f"latent is {self.latent}; keys and values of the model have {2 * width} numbers per token, of "
                f"which {self.rope} keep their position: give at most {most}"
            )
        heads = self.heads(shape)
        fitting = [n for n in range(shape.heads, shape.hidden + 1) if shape.hidden % n == 0]
        allowed = f"give pad_heads_to of {', '.join(map(str, fitting[:6]))}"
        if heads < shape.heads:
            raise ConversionError(
                f"pad_heads_to is {heads}; the model has {shape.heads} heads, and none is taken away: {allowed}"
            )
        if shape.hidden % heads:
            raise ConversionError(
                f"{heads} heads do not divide the hidden size {shape.hidden}, which transformers demands: {allowed}"
            )

    def heads(self, shape: SourceShape) -> int:
        """Query heads of the checkpoint."""
        return self.pad_heads_to or shape.heads

    def written_dtype(self, shape: SourceShape) -> str:
        """Name of the type that weights are written in."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if shape.dtype == "float32" else "bfloat16"


def _multiples(step: int, most: int) -> str:
    """Multiples of a number as people list them, such as ``64, 128, ... 320``."""
    found = [str(number) for number in range(step, most + 1, step)]
    return ", ".join(found if len(found) < 4 else [*found[:2], f"... {found[-1]}"])
