"""All attention methods at one length: prefill in turns, then what each loses; every part as soon as it is measured."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rag_eval.benchmarks.prefill_methods_config import DENSE
from rag_eval.command import Progress
from rag_eval.metrics import answer_nll, interval, log_softmax
from rag_eval.runner.prompts import EvalPrompt
from rag_eval.runner.session import EngineSession
from rag_pipeline.protocol import FusionRequest

_WARM_UP = 2048
"""Tokens of the first text that warm up: more of them would warm nothing else."""

Text = tuple[list[int], list[int]]
"""A prompt, and the tokens that follow it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrefillRun:
    """One prefill.

    Attributes
    ----------
    wall_s, cpu_s : float
        Time to the first token, and CPU time of the engine's processes.
    attention_s, mask_s : float
        Seconds in attention, finding the keys included, and in finding them.
    density : float
        Share of the keys that rows could see which they read.
    """

    wall_s: float
    cpu_s: float
    attention_s: float
    mask_s: float
    density: float


@dataclasses.dataclass(slots=True)
class Losses:
    """What one method lost.

    Attributes
    ----------
    nll : list of float
        By text.
    right, found : list
        By prompt: whether the answer was right, and the NLL of the right one.
    """

    nll: list[float] = dataclasses.field(default_factory=list)
    right: list[bool] = dataclasses.field(default_factory=list)
    found: list[float] = dataclasses.field(default_factory=list)


class LengthRun:
    """Methods side by side at one length.

    Parameters
    ----------
    told : mapping of str to dict
        By method, dense first: ``options``, and what else its row begins with.
    requests : mapping of str to FusionRequest
        By method.
    texts, prompts : sequence
        Texts whose NLL is taken, the first of them prefilled for speed; prompts that ask for something.
    """

    def __init__(
        self,
        told: Mapping[str, dict[str, Any]],
        requests: Mapping[str, FusionRequest],
        texts: Sequence[Text],
        prompts: Sequence[EvalPrompt],
    ) -> None:
        self._told = told
        self._requests = requests
        self._texts = texts
        self._prompts = prompts
        self._runs: dict[str, list[PrefillRun]] = {name: [] for name in told}
        self._losses: dict[str, Losses] = {name: Losses() for name in told}

    def measure(self, session: EngineSession, repeats: int, progress: Progress) -> None:
        """Measure everything; :meth:`rows` has what is there, also where this is broken off.

        Parameters
        ----------
        session : EngineSession
            Measures attention.
        repeats : int
            Rounds of prefills; each method is warmed up before them.
        progress : callable
            Told of each step.
        """
        prompt = self._texts[0][0]
        length = len(prompt)
        for name, request in self._requests.items():
            _prefill(session, prompt[:_WARM_UP], request)
            progress(f"{length} tokens, {name}: warmed up")
        for turn in range(repeats):
            for name in list(self._runs)[:: -1 if turn % 2 else 1]:
                taken = _prefill(session, prompt, self._requests[name])
                self._runs[name].append(taken)
                progress(f"{length} tokens, {name}: {taken.wall_s:.2f} s")
                if turn == repeats - 1:
                    # Behind the prompt that was just prefilled: no need for it to be computed once more.
                    self._losses[name].nll.append(
                        _nll(session, *self._texts[0], self._requests[name])
                    )
        for name, request in self._requests.items():
            lost = self._losses[name]
            for prompt, following in self._texts[1:]:
                session.flush()
                lost.nll.append(_nll(session, prompt, following, request))
            for asked in self._prompts:
                session.flush()
                answer = _answer(session, asked, request)
                lost.right.append(asked.example.answers[0] in answer)
                lost.found.append(_nll(session, asked.input_ids, asked.gold_ids, request))
            progress(f"{length} tokens, {name}: NLL {statistics.mean(lost.nll):.3f}")

    def rows(self) -> dict[str, dict[str, Any]]:
        """By method what was measured: its speed in the rounds that it and dense have, and its losses as far as they are known.

        A method without a round is left out.
        """
        made: dict[str, dict[str, Any]] = {}
        for name, facts in self._told.items():
            rounds = min(len(self._runs[name]), len(self._runs[DENSE]))
            if rounds:
                speed = speed_row(self._runs[name][:rounds], self._runs[DENSE][:rounds])
                losses = loss_row(self._losses[name], self._losses[DENSE])
                made[name] = facts | speed | losses
        return made


def _prefill(session: EngineSession, prompt: Sequence[int], request: FusionRequest) -> PrefillRun:
    """Prefill a prompt alone, its attention measured."""
    session.flush()
    before, cpu = session.fusion_state()["attention"], session.cpu_seconds()
    began = time.perf_counter()
    session.prefill(prompt, request)
    wall_s, cpu_s = time.perf_counter() - began, session.cpu_seconds() - cpu
    after = session.fusion_state()["attention"]
    spent = {kind: after["seconds"][kind] - before["seconds"][kind] for kind in after["seconds"]}
    seen = after["keys_seen"] - before["keys_seen"]
    return PrefillRun(
        wall_s=wall_s,
        cpu_s=cpu_s,
        attention_s=sum(spent.values()),
        mask_s=spent["mask"],
        density=(after["keys_read"] - before["keys_read"]) / seen if seen else 1.0,
    )


def _nll(
    session: EngineSession, prompt: Sequence[int], following: Sequence[int], request: FusionRequest
) -> float:
    logits, _ = session.force(prompt, following, request)
    return answer_nll(log_softmax(logits), following)


def _answer(session: EngineSession, asked: EvalPrompt, request: FusionRequest) -> str:
    answer = session.prefill(asked.input_ids, request, max_new_tokens=len(asked.gold_ids) + 4)
    return session.decode(answer["output_ids"])


def speed_row(runs: list[PrefillRun], dense: list[PrefillRun]) -> dict[str, Any]:
    """Medians, and ratios against dense from the same rounds."""
    attention = [
        own.attention_s / other.attention_s for own, other in zip(runs, dense, strict=True)
    ]
    prefill = [own.wall_s / other.wall_s for own, other in zip(runs, dense, strict=True)]
    cpu = [own.cpu_s / max(other.cpu_s, 0.01) for own, other in zip(runs, dense, strict=True)]
    return {
        "attention_vs_dense": _median(attention),
        "attention_vs_dense_range": [round(min(attention), 4), round(max(attention), 4)],
        "prefill_vs_dense": _median(prefill),
        "prefill_vs_dense_range": [round(min(prefill), 4), round(max(prefill), 4)],
        "prefill_cpu_vs_dense": _median(cpu),
        "attention_s": _median([own.attention_s for own in runs]),
        "estimation_vs_dense": _median(
            [own.mask_s / other.attention_s for own, other in zip(runs, dense, strict=True)]
        ),
        "prefill_s": _median([own.wall_s for own in runs]),
        "density": _median([own.density for own in runs]),
        "n": len(runs),
    }


def loss_row(own: Losses, dense: Losses) -> dict[str, Any]:
    """What a method costs in quality, of the texts and prompts that both went through; differences are those of pairs."""
    made: dict[str, Any] = {}
    texts, prompts = min(len(own.nll), len(dense.nll)), min(len(own.found), len(dense.found))
    if texts:
        nll, nll_dense = own.nll[:texts], dense.nll[:texts]
        base = statistics.mean(nll_dense)
        made |= {
            "nll": round(statistics.mean(nll), 4),
            "nll_delta": round(statistics.mean(nll) / base - 1, 5),
            "nll_delta_each": [
                round(one / other - 1, 5) for one, other in zip(nll, nll_dense, strict=True)
            ],
            "nll_delta_interval": interval(nll, nll_dense, base),
            "nll_n": texts,
        }
    if prompts:
        right, right_dense = own.right[:prompts], dense.right[:prompts]
        made |= {
            "retrieval": round(sum(right) / prompts, 4),
            "retrieval_delta_interval": interval(right, right_dense),
            "retrieval_n": prompts,
            "retrieval_nll": round(statistics.mean(own.found[:prompts]), 4),
            "retrieval_nll_dense": round(statistics.mean(dense.found[:prompts]), 4),
        }
    return made


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4)
