"""Poisson arrivals against a server, with the client, metrics and goodput of SGLang's own benchmark."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rag_eval.errors import EvalError
from rag_eval.runner.modes import Mode
from rag_eval.runner.session import mode_request

if TYPE_CHECKING:
    from rag_eval.runner.prompts import EvalPrompt

SATURATED = 0.8
"""A server is saturated when it has finished less than this share of the requests by the time the
last one arrives: the queue then grows with the length of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRun:
    """One mode at one rate.

    Parameters
    ----------
    rate : float
        Arrivals per second asked for.
    offered : float
        Arrivals per second as the random intervals came out.
    n, failed : int
        Requests sent, and those without an answer.
    ttft_p50_s, ttft_p99_s, ttft_mean_s : float
        Wall time from sending to the first text, seconds.
    latency_p50_s : float
        Wall time to the last token, median, seconds.
    requests_per_s, output_tokens_per_s, input_tokens_per_s : float
        Over `wall_s`.
    goodput_per_s, within_bound : float
        Requests per second, and share of requests, whose first token came within the bound.
    cached_share : float
        Share of prompt tokens that the server took from its radix tree.
    finished_by_last_arrival : float
        Share of the requests finished when the last one arrived.
    saturated : bool
        Whether that is below ``SATURATED``.
    wall_s, cpu_s : float, float or None
        First arrival to last answer; CPU time of the server's processes over it, ``None`` where the
        server is not ours.
    """

    rate: float
    offered: float
    n: int
    failed: int
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_mean_s: float
    latency_p50_s: float
    requests_per_s: float
    output_tokens_per_s: float
    input_tokens_per_s: float
    goodput_per_s: float
    within_bound: float
    cached_share: float
    finished_by_last_arrival: float
    saturated: bool
    wall_s: float
    cpu_s: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, rounded to what a clock can tell."""
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def run_load(
    url: str,
    prompts: Sequence[EvalPrompt],
    mode: Mode,
    *,
    rate: float,
    output_tokens: int,
    ttft_bound_s: float,
    tokenizer: Any,
    seed: int,
    cpu_seconds: Any = None,
) -> LoadRun:
    """Send `prompts` with exponential intervals and wait for all answers.

    Parameters
    ----------
    url : str
        Base URL of the server.
    prompts : sequence of EvalPrompt
        In order of arrival.
    mode : Mode
        How they are served.
    rate : float
        Mean arrivals per second.
    output_tokens : int
        Tokens of every answer; the end token is ignored, so that all modes do the same decoding.
    ttft_bound_s : float
        Bound of the goodput, seconds.
    tokenizer : object
        Tokenizer of transformers; SGLang's metrics count tokens with it.
    seed : int
        Same seed, same arrival times.
    cpu_seconds : object
        Called before and after; CPU time of the server so far, seconds.

    Raises
    ------
    EvalError
        No request at all was answered.
    """
    from sglang.benchmark.goodput import calculate_goodput
    from sglang.benchmark.serving import calculate_metrics

    cpu_before = cpu_seconds() if cpu_seconds else None
    rows = _rows(prompts, mode, output_tokens)
    outputs, sent = asyncio.run(_send(url, rows, rate, seed))
    cpu_s = cpu_seconds() - cpu_before if cpu_seconds else None
    answered = [output for output in outputs if output.success]
    if not answered:
        line = outputs[0].error.strip().splitlines()[-1]
        raise EvalError(f"the server at {url} answered none of {len(rows)} requests: {line}")
    wall_s = max(output.start_time + output.latency for output in answered) - min(sent)
    for output in answered:
        # No text at all, as with half a character: the client saw nothing before the end.
        output.ttft = output.ttft or output.latency
    metrics, _ = calculate_metrics(rows, outputs, wall_s, tokenizer, "sglang")
    goodput = calculate_goodput(outputs, {"ttft": ttft_bound_s * 1000}, wall_s)
    last = max(sent)
    done = sum(output.start_time + output.latency <= last for output in answered) / len(rows)
    return LoadRun(
        rate=rate,
        offered=(len(rows) - 1) / (last - min(sent)) if last > min(sent) else rate,
        n=len(rows),
        failed=len(outputs) - len(answered),
        ttft_p50_s=metrics.median_ttft_ms / 1000,
        ttft_p99_s=metrics.p99_ttft_ms / 1000,
        ttft_mean_s=metrics.mean_ttft_ms / 1000,
        latency_p50_s=metrics.median_e2e_latency_ms / 1000,
        requests_per_s=metrics.request_throughput,
        output_tokens_per_s=metrics.output_throughput,
        input_tokens_per_s=metrics.input_throughput,
        goodput_per_s=goodput.request_goodput,
        within_bound=goodput.slo_attainment,
        cached_share=sum(o.cached_tokens for o in answered) / max(1, metrics.total_input),
        finished_by_last_arrival=done,
        saturated=done < SATURATED,
        wall_s=wall_s,
        cpu_s=cpu_s,
    )


def _rows(prompts: Sequence[EvalPrompt], mode: Mode, output_tokens: int) -> list[Any]:
    from sglang.benchmark.datasets.common import DatasetRow

    return [
        DatasetRow(
            prompt=prompt.input_ids,
            prompt_len=len(prompt.input_ids),
            output_len=output_tokens,
            extra_request_body={"kv_hints": mode_request(prompt, mode).to_kv_hints()},
        )
        for prompt in prompts
    ]


async def _send(url: str, rows: list[Any], rate: float, seed: int) -> tuple[list[Any], list[float]]:
    """Answers, and when their requests were sent on the client's clock."""
    import numpy as np
    from sglang.benchmark import serving

    serving.set_global_args(_CLIENT)
    # The generator that SGLang draws its intervals from.
    np.random.seed(seed)
    sent, tasks = [], []
    async for row in serving.get_request(rows, rate):
        request = serving.RequestFuncInput(
            prompt=row.prompt,
            api_url=f"{url}/generate",
            prompt_len=row.prompt_len,
            output_len=row.output_len,
            model="",
            lora_name=None,
            image_data=None,
            extra_request_body=row.extra_request_body,
        )
        sent.append(time.perf_counter())
        tasks.append(asyncio.create_task(serving.async_request_sglang_generate(request)))
    return await asyncio.gather(*tasks), sent


_CLIENT = argparse.Namespace(
    temperature=0.0,
    top_p=1.0,
    disable_ignore_eos=False,
    disable_stream=False,
    return_logprob=False,
    return_routed_experts=False,
    logprob_start_len=-1,
    top_logprobs_num=0,
    token_ids_logprob=None,
    cache_report=True,
    header=None,
)
"""What the client reads from the options of SGLang's own command line."""
