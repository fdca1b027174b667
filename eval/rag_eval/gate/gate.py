"""One gate from model name to verdict."""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rag_eval.datasets import DatasetOptions, load_dataset
from rag_eval.errors import EvalError
from rag_eval.gate.exactness import Exactness, measure_exactness
from rag_eval.gate.record import installed_versions, model_identity
from rag_eval.gate.thresholds import Thresholds
from rag_eval.gate.verdict import (
    Check,
    finite,
    judge_exactness,
    judge_fidelity,
    largest,
    mean_kl,
    notes,
    verdicts,
)
from rag_eval.result import EvalResult
from rag_eval.runner.measure import measure_example
from rag_eval.runner.modes import FULL, PLAIN_REUSE, PREFIX, Mode, parse_modes
from rag_eval.runner.prompts import EvalPrompt, PromptMaker
from rag_eval.runner.session import EngineSession
from rag_eval.runner.summary import summarise

Progress = Callable[[str], None]

DATASET = "planted-1hop"
FORMAT = 1
"""Version of the JSON; raised when a field changes its meaning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """What a gate is told.

    Parameters
    ----------
    model : str
        Hub id, folder, GGUF file or packaged name.
    policies : str
        Policies to judge, comma between, with ratio and options as for the evaluation
        (``query:0.15,epic:0.1``); empty for the default policy of the engine.
    examples : int
        Prompts of the fidelity run.
    exact_prompts : int
        Prompts of the exactness checks.
    options : DatasetOptions
        Shape of the prompts.
    max_new_tokens, gold_tokens : int
        Length of the greedy answer, and most tokens of the gold answer that are followed.
    seed : int
        Chooses facts and filler.
    thresholds : Thresholds
        Limits of the verdict.
    engine_args : dict
        Further arguments of ``sglang.Engine``; give those of production.
    """

    model: str
    policies: str = ""
    examples: int = 8
    exact_prompts: int = 2
    options: DatasetOptions = field(default_factory=DatasetOptions)
    max_new_tokens: int = 16
    gold_tokens: int = 10
    seed: int = 0
    thresholds: Thresholds = field(default_factory=Thresholds)
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("examples", "exact_prompts", "max_new_tokens", "gold_tokens"):
            if getattr(self, name) < 1:
                raise EvalError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.options.chunks < 2:
            raise EvalError(
                f"chunks is {self.options.chunks}; a gate needs 2 or more: with one chunk, "
                "everything cached is a prefix"
            )
        self.parsed()

    def parsed(self) -> tuple[Mode, ...]:
        """The policies to judge.

        Raises
        ------
        EvalError
            An unknown policy or option, or a mode that fuses nothing.
        """
        names = [name.strip() for name in self.policies.split(",") if name.strip()]
        for name in names:
            if name in (FULL, PREFIX):
                raise EvalError(
                    f"policy {name!r} reuses no chunk, so there is nothing to judge; name "
                    "policies such as query:0.15"
                )
        modes = parse_modes(names or [default_policy()])
        return tuple(mode for mode in modes if mode.fused)


def default_policy() -> str:
    """The policy that this engine serves when a request names none, with its ratio."""
    from chunk_cache.policies import create_policy
    from rag_pipeline.sglang_plugin import FusionConfig

    name = FusionConfig.from_env().policy
    return name if ":" in name or name == "reuse" else f"{name}:{create_policy(name).ratio:g}"


def run_gate(
    config: GateConfig,
    progress: Progress = lambda line: None,
    *,
    session: EngineSession | None = None,
) -> dict[str, Any]:
    """Measure and judge; nothing is stored (see :func:`rag_eval.gate.save_gate`).

    Parameters
    ----------
    config : GateConfig
        What to do.
    progress : Progress
        Called with one line of progress at a time.
    session : EngineSession, optional
        A running engine to use (left open); one is started otherwise.

    Returns
    -------
    dict
        JSON-ready: ``passed``, ``policies`` (verdict by policy), ``checks``, ``notes`` (what these cannot
        say about the model), ``noise_floor``, ``thresholds``, ``fidelity``, ``identity``, ``versions``, ``engine``, ``settings``.

    Raises
    ------
    EvalError, RagPipelineError
        One line: a bad setting, no such model, or the engine does not start.
    """
    from rag_eval.runner.run import model_folder

    modes = config.parsed()
    began = time.monotonic()
    folder, vocabulary = model_folder(config.model, progress)
    maker = PromptMaker(folder, gold_tokens=config.gold_tokens)
    prompts = _prompts(config, maker)
    opened = session or _start(maker, vocabulary, config, progress)
    try:
        engine = opened.facts()
        exact = measure_exactness(
            opened,
            prompts[: config.exact_prompts],
            modes,
            answer_tokens=config.max_new_tokens,
            progress=progress,
        )
        fidelity = _fidelity(opened, prompts[: config.examples], modes, exact, config, progress)
    finally:
        if session is None:
            opened.close()
    return {
        "format": FORMAT,
        "model": config.model,
        "identity": model_identity(folder),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wall_s": round(time.monotonic() - began, 1),
        "versions": installed_versions(),
        "engine": engine,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "settings": _settings(config, modes),
        **judge(exact, fidelity, modes, config.thresholds),
    }


def judge(
    exact: Exactness, fidelity: EvalResult | None, modes: Sequence[Mode], limits: Thresholds
) -> dict[str, Any]:
    """Verdict on what was measured: the part of the JSON that the thresholds decide."""
    floor = mean_kl(exact.floor)
    exact_kl = limits.exact_kl(floor, fp32=exact.fp32)
    checks: list[Check] = judge_exactness(exact, modes, limits)
    unsaid: list[str] = []
    if fidelity is not None:
        unsaid = notes(fidelity.modes, exact_kl=exact_kl)
        served = [mode for mode in modes if mode.name in fidelity.modes]
        checks += judge_fidelity(fidelity.modes, served, limits, exact_kl=exact_kl)
    policies = verdicts(checks, modes)
    return {
        "passed": all(verdict["passed"] for verdict in policies.values()),
        "policies": policies,
        "checks": [check.to_json() for check in checks],
        "notes": unsaid,
        "noise_floor": {
            "kl": finite(floor),
            "kl_max": finite(largest(d.kl_max for d in exact.floor)),
            "log_prob_max": finite(largest(d.log_prob for d in exact.floor)),
            "n": len(exact.floor),
        },
        "thresholds": limits.to_json() | {"exact_kl": exact_kl},
        "fidelity": fidelity.to_json() if fidelity else {},
    }


def _prompts(config: GateConfig, maker: PromptMaker) -> list[EvalPrompt]:
    options = replace(config.options, seed=config.seed)
    examples = load_dataset(
        DATASET,
        encode=maker.encode,
        options=options,
        limit=max(config.examples, config.exact_prompts),
    )
    return [maker.make(example, options) for example in examples]


def _start(
    maker: PromptMaker, vocabulary: int, config: GateConfig, progress: Progress
) -> EngineSession:
    from rag_eval.runner.engine import start_session
    from rag_eval.runner.passage import fusion_settings, write_corpus_passage

    progress(f"starting the engine with {config.model}")
    with tempfile.TemporaryDirectory() as folder:
        passage = write_corpus_passage(DATASET, Path(folder))
        with fusion_settings(passage_file=passage):
            return start_session(maker, vocabulary, config.engine_args)


def _fidelity(
    session: EngineSession,
    prompts: Sequence[EvalPrompt],
    modes: Sequence[Mode],
    exact: Exactness,
    config: GateConfig,
    progress: Progress,
) -> EvalResult | None:
    """A short run of the modes that are served, with plain reuse as the yardstick."""
    served = [mode for mode in modes if mode.name not in exact.unavailable]
    broken = not all(math.isfinite(d.kl) for found in exact.checks.values() for d in found)
    if "" in exact.unavailable or not served or broken:
        return None
    own = [mode.name for mode in served if mode.name != PLAIN_REUSE]
    names = [FULL, PLAIN_REUSE, *own]
    records = []
    for turn, prompt in enumerate(prompts):
        record = measure_example(
            session,
            prompt,
            parse_modes(names),
            max_new_tokens=config.max_new_tokens,
            turn=turn,
            with_noise_floor=turn == 0,
        )
        records.append(record)
        progress(f"fidelity: example {turn + 1} of {len(prompts)}")
    return summarise(
        records, names, dataset=DATASET, model=Path(config.model).name, seed=config.seed
    )


def _settings(config: GateConfig, modes: Sequence[Mode]) -> dict[str, Any]:
    fields = asdict(config)
    for name in ("model", "thresholds"):
        del fields[name]
    return fields | {"policies": [mode.name for mode in modes], "dataset": DATASET}
