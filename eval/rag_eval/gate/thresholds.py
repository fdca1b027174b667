"""The limits of a gate, each with its reason; every one can be set on the command line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from rag_eval.errors import EvalError


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """What a model has to keep to.

    Parameters
    ----------
    noise_factor : float
        Exact paths may be this many times further from plain prefill than plain prefill in another
        batching is from itself, in mean KL over prompts and answer tokens; log-probabilities of
        tied tokens the root of it. Fused rows go through another attention kernel, so their sums run
        in yet another order: measured, they are 3 to 7 times the floor. A wrong mask, position or
        key is off by orders of magnitude.
    least_kl, least_kl_fp32 : float
        Exactness is never asked for below this KL, nats. In half precision many batchings give the
        same bits, so a few of them may show a floor of nearly nothing; a model of 135M parameters
        is 0.0003 to 0.003 from itself, and a wrong position or mask costs 0.1 and more. With fp32
        weights the floor is some 1e-12, so a gate of an engine with ``dtype="float32"`` is the sharpest.
    max_kl_of_reuse : float
        A policy's KL to full prefill over the KL of reusing chunks without any recomputation. A
        policy that leaves more of the distance than this does not earn its work. Not asked of
        ``reuse`` itself.
    min_agreement : float
        Least share of greedy answers whose first tokens are those of full prefill.
    max_f1_drop : float
        Most that token F1 on planted facts may fall below full prefill's.

    Raises
    ------
    EvalError
        A limit outside its range.
    """

    noise_factor: float = 16.0
    least_kl: float = 0.01
    least_kl_fp32: float = 1e-6
    max_kl_of_reuse: float = 0.6
    min_agreement: float = 0.5
    max_f1_drop: float = 0.15

    def __post_init__(self) -> None:
        for name in ("noise_factor", "least_kl", "least_kl_fp32", "max_kl_of_reuse"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise EvalError(f"{name} is {value}; allowed: 0 or more")
        for name in ("min_agreement", "max_f1_drop"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise EvalError(f"{name} is {value}; allowed: 0 to 1")

    def exact_kl(self, floor: float, *, fp32: bool) -> float:
        """Largest KL that counts as exact, nats, where the noise floor is `floor`."""
        return max(self.least_kl_fp32 if fp32 else self.least_kl, self.noise_factor * floor)

    def tie(self, floor: float, exact_kl: float) -> float:
        """Largest lead of one token over another that counts as a tie, nats.

        `floor` is how far re-batching moves a log-probability. Two log-probabilities that are off by
        d each change their order within 2 d, and KL is about d * d / 2.
        """
        return max(2 * math.sqrt(2 * exact_kl), math.sqrt(self.noise_factor) * floor)

    def to_json(self) -> dict[str, float]:
        """Return the limits as JSON types."""
        return asdict(self)
