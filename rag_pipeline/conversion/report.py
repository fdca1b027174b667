"""What a conversion did: perplexity before and after, and bytes per token of KV."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPerplexity:
    """Perplexity on one text that was not calibrated on.

    Parameters
    ----------
    text : str
        Its name.
    n_tokens : int
        Tokens predicted.
    original, converted : float
        Perplexity of either model.
    """

    text: str
    n_tokens: int
    original: float
    converted: float

    @property
    def change(self) -> float:
        """Relative change; 0.06 is 6% worse."""
        return self.converted / self.original - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """Result of a conversion.

    Parameters
    ----------
    model, out : str
        What was converted, and the folder of the result.
    rope, latent, heads : int
        Numbers per token with a position and in the latent; query heads with those of zeros.
    dtype : str
        Of the written weights.
    calibration_tokens : int
        Tokens calibrated on.
    original_bytes_per_token, converted_bytes_per_token : int
        KV of one token in all layers, in that type.
    latent_loss : float
        Share of the weighted energy that the latents lost, mean over layers.
    perplexity : tuple of TextPerplexity
        Per text.
    """

    model: str
    out: str
    rope: int
    latent: int
    heads: int
    dtype: str
    calibration_tokens: int
    original_bytes_per_token: int
    converted_bytes_per_token: int
    latent_loss: float
    perplexity: tuple[TextPerplexity, ...]

    def to_json(self) -> dict[str, Any]:
        """As numbers and strings."""
        plain = asdict(self)
        plain["perplexity"] = [
            asdict(entry) | {"change": entry.change} for entry in self.perplexity
        ]
        return plain

    def table(self) -> str:
        """For a person to read."""
        before, after = self.original_bytes_per_token, self.converted_bytes_per_token
        lines = [
            f"{'text':<20} {'tokens':>7} {'original':>9} {'converted':>9} {'change':>8}",
            *(
                f"{entry.text:<20} {entry.n_tokens:>7} {entry.original:>9.3f} {entry.converted:>9.3f} "
                f"{entry.change:>+8.1%}"
                for entry in self.perplexity
            ),
            f"KV per token: {before} bytes before, {after} after ({1 - after / before:.0%} less)",
            self.out,
        ]
        return "\n".join(lines)
