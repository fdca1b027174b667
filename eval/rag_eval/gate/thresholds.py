"""The limits of a gate, each with its reason; every one can be set on the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rag_eval.errors import EvalError


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """What a model has to keep to.

    Parameters
    ----------
    noise_factor
        Exact paths may be this many times further from plain prefill than plain prefill in another
        batching is from itself, in mean KL over prompts and answer tokens. Another batching is
        another order of sums, so both scatter; a wrong mask, position or key is off by orders of
        magnitude.
    least_kl
        Exactness is never asked for below this KL, nats: on fp32 weights the noise floor is nearly
        nothing, and a difference of this size moves no token.
    max_kl_of_reuse
        A policy's KL to full prefill over the KL of reusing chunks without any recomputation. A
        policy that leaves more of the distance than this does not earn its work. Not asked of
        ``reuse`` itself.
    min_agreement
        Least share of greedy answers whose first tokens are those of full prefill.
    max_f1_drop
        Most that token F1 on planted facts may fall below full prefill's.

    Raises
    ------
    EvalError
        A limit outside its range.
    """

    noise_factor: float = 4.0
    least_kl: float = 1e-6
    max_kl_of_reuse: float = 0.6
    min_agreement: float = 0.5
    max_f1_drop: float = 0.15

    def __post_init__(self) -> None:
        for name in ("noise_factor", "least_kl", "max_kl_of_reuse"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise EvalError(f"{name} is {value}; allowed: 0 or more")
        for name in ("min_agreement", "max_f1_drop"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise EvalError(f"{name} is {value}; allowed: 0 to 1")

    def exact_kl(self, floor: float) -> float:
        """Largest KL that counts as exact, nats, where the noise floor is `floor`."""
        return max(self.least_kl, self.noise_factor * floor)

    def to_json(self) -> dict[str, float]:
        """Return the limits as JSON types."""
        return asdict(self)
