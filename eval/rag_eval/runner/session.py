"""The engine as a run uses it: serve, follow the gold answer, build chunks, flush."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rag_eval.errors import ModeUnavailableError
from rag_eval.runner.cpu import EngineCpu
from rag_eval.runner.forcing import forcing_params, processor_string, read_logits
from rag_eval.runner.modes import Mode
from rag_eval.runner.prompts import EvalPrompt
from rag_pipeline.protocol import (
    FUSION_KEY,
    LEFT_ALONE,
    FusionRequest,
    StreamReader,
    build_requests,
    fusion_report,
)

_FLUSH_TRIES = 50
_FLUSH_WAIT_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """Greedy answer to one prompt.

    Parameters
    ----------
    output_ids : tuple of int
        Generated tokens, the end token included where there is one.
    ttft_s : float
        Wall time from sending the request to its first token.
    ttft_cpu_s : float
        CPU time of the engine's processes over the same interval.
    usage : dict
        Tokens of the prompt by what happened to them, ``computed_fraction``, ``fallback``; empty
        where the stream lost it (:meth:`EngineSession.follow_gold` reports on the same prompt).
    """

    output_ids: tuple[int, ...]
    ttft_s: float
    ttft_cpu_s: float
    usage: dict[str, Any]


class Answered(NamedTuple):
    """Greedy answer to any prompt: its tokens, seconds to the first, and the engine's ``meta_info``."""

    output_ids: tuple[int, ...]
    ttft_s: float
    ttft_cpu_s: float
    meta: dict[str, Any]


class EngineSession:
    """One engine, one request at a time.

    Parameters
    ----------
    engine : object
        A running ``sglang.Engine`` with ``enable_custom_logit_processor``.
    decode : callable
        Text of generated tokens, control tokens left out.
    vocabulary : int
        Size of the model's vocabulary; padded columns of the logits behind it are dropped.
    """

    def __init__(
        self, engine: Any, decode: Callable[[Sequence[int]], str], vocabulary: int
    ) -> None:
        self._engine = engine
        self.decode = decode
        self._vocabulary = vocabulary
        self._cpu = EngineCpu()
        self._scratch = tempfile.TemporaryDirectory(prefix="rag-eval-")
        self._processor = processor_string()
        self._proven: set[str] = set()

    @property
    def engine(self) -> Any:
        """The ``sglang.Engine``."""
        return self._engine

    @property
    def is_fp32(self) -> bool:
        """Whether the engine computes in fp32; SGLang does so only where it is told to."""
        return str(self._engine.server_args.dtype) in ("float32", "float")

    def close(self) -> None:
        """Stop the engine and remove the scratch files."""
        self._engine.shutdown()
        self._scratch.cleanup()

    def facts(self) -> dict[str, Any]:
        """What the engine says it is: plugin, attention, versions, threads."""
        from rag_pipeline.sglang_plugin import activation_of

        found: dict[str, Any] = activation_of(self._engine).to_json()
        return {name: value for name, value in found.items() if name != "scheduler_pid"}

    def flush(self) -> None:
        """Empty the radix tree.

        Raises
        ------
        RuntimeError
            The engine refuses; it says so only by its return value, and a run that went on would
            measure cache hits as prefill.
        """
        for _ in range(_FLUSH_TRIES):
            answer = self._engine.flush_cache()
            if getattr(answer, "success", answer):
                return
            time.sleep(_FLUSH_WAIT_S)
        raise RuntimeError("the engine did not flush its cache: requests are still running in it")

    def cpu_seconds(self) -> float:
        """CPU time of the engine's processes so far."""
        return self._cpu.seconds()

    def fusion_state(self) -> dict[str, Any]:
        """What the first scheduler says of fusion: settings, store, counts."""
        found: dict[str, Any] = self._engine.get_server_info()["internal_states"][0][FUSION_KEY]
        return found

    def prefill(
        self,
        input_ids: Sequence[int],
        fusion: FusionRequest = LEFT_ALONE,
        *,
        max_new_tokens: int = 1,
    ) -> Any:
        """Serve a prompt for its KV alone, or with an answer of so many tokens."""
        return self._engine.generate(
            input_ids=list(input_ids),
            sampling_params={
                "temperature": 0.0,
                "max_new_tokens": max_new_tokens,
                "ignore_eos": True,
            },
            kv_hints=fusion.to_kv_hints(),
        )

    def build_chunks(self, prompt: EvalPrompt, *, store: bool) -> None:
        """Compute every chunk behind the shared prefix, and keep its KV when `store` is set."""
        start = len(prompt.prefix_ids)
        for chunk in prompt.chunks:
            own = LEFT_ALONE
            if store:
                own, elsewhere = build_requests(start, len(chunk.ids))
                self.prefill([*prompt.prefix_ids, *chunk.ids], elsewhere)
            self.prefill([*prompt.prefix_ids, *chunk.ids], own)

    def serve(self, prompt: EvalPrompt, mode: Mode, *, max_new_tokens: int) -> Served:
        """Answer greedily and time the first token.

        Raises
        ------
        ModeUnavailableError
            The engine does not fuse at all, or not the first prompt it is asked to.
        """
        request = mode_request(prompt, mode)
        served = self.answer(prompt.input_ids, request, max_new_tokens=max_new_tokens)
        # SGLang may merge streamed pieces that nobody has read yet, and the report goes with them.
        lost = mode.fused and not fusion_report(served.meta)
        usage = {} if lost else self._usage(served.meta, mode)
        return Served(
            output_ids=served.output_ids,
            ttft_s=served.ttft_s,
            ttft_cpu_s=served.ttft_cpu_s,
            usage=usage,
        )

    def answer(
        self, input_ids: Sequence[int], fusion: FusionRequest, *, max_new_tokens: int
    ) -> Answered:
        """Answer any prompt greedily and time the first token.

        Parameters
        ----------
        input_ids : sequence of int
            The prompt.
        fusion : FusionRequest
            What the request asks of fusion.
        max_new_tokens : int
            Most tokens of the answer.
        """
        stream = self._engine.generate(
            input_ids=list(input_ids),
            sampling_params={"temperature": 0.0, "max_new_tokens": max_new_tokens},
            kv_hints=fusion.to_kv_hints(),
            stream=True,
        )
        cpu_before = self._cpu.seconds()
        started = time.perf_counter()
        reader = StreamReader(incremental=False)
        last: dict[str, Any] = {}
        ttft_s = ttft_cpu_s = -1.0
        for piece in stream:
            last = piece
            reader.read(piece)
            if ttft_s < 0:
                ttft_s = time.perf_counter() - started
                ttft_cpu_s = self._cpu.seconds() - cpu_before
        return Answered(tuple(last["output_ids"]), ttft_s, ttft_cpu_s, reader.meta)

    def follow_gold(
        self, prompt: EvalPrompt, mode: Mode, *, without_hints: bool = False
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Logits that predict each gold token, with the gold tokens before it forced.

        Parameters
        ----------
        prompt, mode : EvalPrompt, Mode
            As for :meth:`serve`.
        without_hints : bool
            Send no fusion fields at all, as a client that knows nothing of the plugin. Only for
            modes that fuse nothing.

        Returns
        -------
        ndarray
            ``(gold tokens, vocabulary)``, float32, as the engine sampled from them.
        dict
            Usage of this request.
        """
        fusion = None if without_hints else mode_request(prompt, mode)
        logits, meta = self.force(prompt.input_ids, prompt.gold_ids, fusion)
        return logits, self._usage(meta, mode)

    def force(
        self, input_ids: Sequence[int], answer_ids: Sequence[int], fusion: FusionRequest | None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Logits that predict each token of a given answer, with those before it forced.

        Parameters
        ----------
        input_ids : sequence of int
            The prompt.
        answer_ids : sequence of int
            The answer, at least one token.
        fusion : FusionRequest or None
            What the request asks of fusion; None sends no fusion fields at all.

        Returns
        -------
        ndarray
            ``(answer tokens, vocabulary)``, float32, as the engine sampled from them.
        dict
            ``meta_info`` of the request.
        """
        forced = list(answer_ids)
        file = Path(self._scratch.name) / "logits.bin"
        answer = self._engine.generate(
            input_ids=list(input_ids),
            sampling_params={
                "temperature": 0.0,
                "max_new_tokens": len(forced),
                "ignore_eos": True,
                "custom_params": forcing_params(forced, file),
            },
            custom_logit_processor=self._processor,
            kv_hints=None if fusion is None else fusion.to_kv_hints(),
        )
        if list(answer["output_ids"]) != forced:
            raise RuntimeError(
                f"a forced answer came out as {answer['output_ids']}, expected {forced}: "
                "the engine sampled in the middle of the prompt"
            )
        return read_logits(file, len(forced))[:, : self._vocabulary], answer["meta_info"]

    def _usage(self, meta: dict[str, Any], mode: Mode) -> dict[str, Any]:
        prompt_tokens, cached = int(meta["prompt_tokens"]), int(meta["cached_tokens"])
        if not mode.fused:
            return {
                "exact_prefix_tokens": cached,
                "reused_tokens": 0,
                "recomputed_tokens": 0,
                "fresh_tokens": prompt_tokens - cached,
                "computed_fraction": (prompt_tokens - cached) / prompt_tokens,
                "fallback": "",
            }
        report = fusion_report(meta)
        if report is None:
            raise ModeUnavailableError(
                f"mode {mode.name!r} needs chunk-KV fusion, which this engine does not report; "
                "start it with the plugin on, or leave the mode out"
            )
        # A run may meet a rare fallback and count it; one that begins with it compares nothing.
        if report["fallback"] and not report["reused_tokens"] and mode.name not in self._proven:
            raise ModeUnavailableError(
                f"mode {mode.name!r} is not served by this engine: it prefilled as usual, "
                f"reason {report['fallback']!r}; leave the mode out or mend the reason"
            )
        self._proven.add(mode.name)
        keys = (
            "exact_prefix_tokens",
            "reused_tokens",
            "recomputed_tokens",
            "fresh_tokens",
            "computed_fraction",
            "fallback",
        )
        usage = {key: report[key] for key in keys}
        # The engine's share is over what lies behind the exact prefix. Here every mode is charged
        # on the same scale, all tokens of the prompt, or `prefix` could not stand beside it.
        behind = prompt_tokens - int(report["exact_prefix_tokens"])
        usage["computed_fraction_behind_prefix"] = report["computed_fraction"]
        usage["computed_fraction"] = report["computed_fraction"] * behind / prompt_tokens
        return usage


def mode_request(prompt: EvalPrompt, mode: Mode) -> FusionRequest:
    """What a request in a mode asks of fusion; modes without fusion switch matching off."""
    if not mode.fused:
        return LEFT_ALONE
    return FusionRequest(
        spans=prompt.spans,
        prefix_len=len(prompt.prefix_ids),
        policy=mode.policy,
        ratio=mode.ratio,
        options=tuple(sorted(mode.options.items())),
        passage=None if mode.passage else False,
    )
