"""Settings of an evaluation of conversation memories."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rag_eval.arguments import require_at_least
from rag_eval.datasets import CUT_SIDES, CutSide
from rag_eval.errors import EvalError

DEFAULT_METHODS = "full,epicache,streaming,snapkv,keydiff,retrieval"
FULL = "full"
RETRIEVAL = "retrieval"
LEAST_BUDGET = 16
EPISODIC = "epicache"
"""Methods whose name begins like this have a record for each topic."""

_TIMES = re.compile(r"(\d+(?:\.\d+)?)x")


def is_episodic(method: str) -> bool:
    """Whether a method has a record for each topic; every other one is a baseline for those."""
    return method.startswith(EPISODIC)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationConfig:
    """Settings of a run.

    Parameters
    ----------
    dataset : str
        File or folder, see :func:`rag_eval.datasets.read_conversations`.
    model : str
        Hub id, folder, GGUF file or packaged name.
    out : Path
        Folder of the run; a run that stopped goes on where it stood, with more questions or methods if asked.
    methods : str
        Names of memory methods, comma between; options of a rule as in ``snapkv:window=64``.
    budget : str
        Tokens of the history that a method may keep, or ``4x`` for a quarter of each history.
    max_tokens : int or None
        Tokens that each conversation is cut to; None for as many as the model's context has room for.
    cut : CutSide
        Which end of a longer conversation stays.
    limit_conversations, limit_questions : int or None
        The first so many, questions per conversation; may grow from one run to the next.
    max_new_tokens : int
        Length of the greedy answer.
    gold_tokens : int
        Most tokens of the gold answer that are teacher-forced.
    embedder : str
        Sentence model of segments and questions.
    memory : dict
        Further fields of :class:`rag_pipeline.memory.MemoryConfig`, for methods that have a memory.
    engine_args : dict
        Further arguments of ``sglang.Engine``.
    """

    dataset: str
    model: str
    out: Path
    methods: str = DEFAULT_METHODS
    budget: str = "2048"
    max_tokens: int | None = None
    cut: CutSide = "first"
    limit_conversations: int | None = None
    limit_questions: int | None = None
    max_new_tokens: int = 24
    gold_tokens: int = 32
    embedder: str = "all-minilm-l6-v2"
    memory: dict[str, Any] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_new_tokens", "gold_tokens")
        for name in ("limit_conversations", "limit_questions"):
            if getattr(self, name) is not None:
                require_at_least(self, 1, name)
        if self.max_tokens is not None:
            require_at_least(self, LEAST_BUDGET, "max_tokens")
        if self.cut not in CUT_SIDES:
            raise EvalError(f"cut is {self.cut!r}; allowed: {', '.join(CUT_SIDES)}")
        if len(set(self.method_names)) < len(self.method_names) or not self.method_names:
            raise EvalError(f"methods is {self.methods!r}; name each method once, comma between")
        self.budget_for(1 << 20)
        for name in ("method", "budget_tokens"):
            if name in self.memory:
                raise EvalError(f"memory field {name} is given by its own option")

    @property
    def method_names(self) -> list[str]:
        """Methods in the order asked for; an option of a rule may hold commas behind its colon."""
        names: list[str] = []
        for word in self.methods.split(","):
            is_option = "=" in word and ":" not in word
            if is_option and names:
                names[-1] += f",{word.strip()}"
            elif word.strip():
                names.append(word.strip())
        return names

    def budget_for(self, history_tokens: int) -> int:
        """Tokens that a method may keep of a history of so many.

        Raises
        ------
        EvalError
            The budget is neither a number of tokens nor a factor like ``4x``.
        """
        times = _TIMES.fullmatch(self.budget.strip())
        if times and float(times[1]) >= 1:
            return max(LEAST_BUDGET, round(history_tokens / float(times[1])))
        if self.budget.strip().isdecimal() and int(self.budget) >= LEAST_BUDGET:
            return int(self.budget)
        raise EvalError(
            f"budget is {self.budget!r}; give tokens, {LEAST_BUDGET} or more, or 4x for a quarter of the history"
        )

    def identity(self) -> dict[str, Any]:
        """Everything that changes the result of one question under one method, JSON-ready."""
        fields = asdict(self)
        for name in ("out", "methods", "limit_conversations", "limit_questions"):
            del fields[name]
        return fields
