"""Run configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rag_eval.datasets import DatasetOptions
from rag_eval.errors import EvalError
from rag_eval.runner.measure import SEEN_BEFORE, SeenBefore
from rag_eval.runner.modes import Mode, parse_modes

DEFAULT_MODES = "full,prefix,reuse+passage=false,reuse,cacheblend,epic,query"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Settings of a run.

    Parameters
    ----------
    dataset : str
        File or generator name, see :func:`rag_eval.datasets.load_dataset`.
    model : str
        Hub id, folder, GGUF file or packaged name.
    out : Path
        Folder for ``config.yaml``, ``predictions.jsonl``, ``metrics.json``, table and plots. A run
        that stopped goes on where it stood.
    modes : str
        ``full,prefix,reuse,cacheblend:0.15,query:0.15+mean_shift=0``; ``full`` is always measured.
    limit : int or None
        First n examples only; may grow from one run to the next.
    seed : int
        Order of chunks, choice of distractors, generators, bootstrap.
    options : DatasetOptions
        Shape of the prompts; its seed is replaced by `seed`.
    max_new_tokens : int
        Length of the greedy answer.
    gold_tokens : int
        Most tokens of the gold answer that are teacher-forced.
    noise_every : int
        The noise floor is measured on every n-th example; 0 leaves it out.
    seen_before : SeenBefore
        What the engine served before each example: every chunk ``alone`` behind the shared
        prefix, or also one prompt with the chunks ``permuted``.
    retrieve : Path or None
        Index folder: chunks come from there instead of the data set's contexts.
    passage : {'corpus', 'builtin'}
        Text that chunk KV for use away from its own place is computed behind: a sample of the
        ``corpus`` (of examples that the run does not measure, where the data set has more), or the
        ``builtin`` prose. A passage file in the settings of fusion comes before both.
    engine_args : dict
        Further arguments of ``sglang.Engine``; they belong to the identity of a run.
    """

    dataset: str
    model: str
    out: Path
    modes: str = DEFAULT_MODES
    limit: int | None = None
    seed: int = 0
    options: DatasetOptions = field(default_factory=DatasetOptions)
    max_new_tokens: int = 16
    gold_tokens: int = 10
    noise_every: int = 4
    seen_before: SeenBefore = "alone"
    retrieve: Path | None = None
    passage: Literal["corpus", "builtin"] = "corpus"
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "gold_tokens"):
            if getattr(self, name) < 1:
                raise EvalError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.noise_every < 0:
            raise EvalError(f"noise_every is {self.noise_every}; allowed: 0 (never) or more")
        if self.seen_before not in SEEN_BEFORE:
            raise EvalError(
                f"seen_before is {self.seen_before!r}; allowed: {', '.join(SEEN_BEFORE)}"
            )
        if self.passage not in ("corpus", "builtin"):
            raise EvalError(f"passage is {self.passage!r}; allowed: corpus, builtin")
        if self.limit is not None and self.limit < 1:
            raise EvalError(f"limit is {self.limit}; allowed: 1 or more")
        parse_modes(self.modes)

    @property
    def parsed_modes(self) -> tuple[Mode, ...]:
        """The modes, ``full`` among them."""
        return parse_modes(self.modes)

    def identity(self) -> dict[str, Any]:
        """Everything that changes a result of one example, JSON-ready."""
        fields = asdict(self)
        for name in ("out", "limit"):
            del fields[name]
        fields["modes"] = [mode.name for mode in self.parsed_modes]
        fields["retrieve"] = str(self.retrieve) if self.retrieve else None
        fields["options"]["seed"] = self.seed
        return fields
