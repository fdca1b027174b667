"""Start-up of an engine, from a fresh Python to the first token.

``python -m rag_eval.benchmarks.startup --model FOLDER [--repeats N] [--json]``

Each variant is a process of its own; variants take turns, so that a neighbour's load and the file
cache fall on all of them. Wall time is what a user waits; CPU time is that of all processes of the
engine when the first token is there, and depends less on the load.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from rag_eval.arguments import add_json_option
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, versions_of
from rag_eval.command import print_report, refusals_in_one_line, say_progress

__all__ = ["VARIANTS", "main", "run"]

_FAST = "from rag_pipeline.sglang_plugin import create_engine; engine = create_engine({model!r})"
_PLAIN = (
    "import sglang; engine = sglang.Engine(model_path={model!r}, attention_backend='rag_cpu', "
    "disable_cuda_graph=True, max_total_tokens=16384, sleep_on_idle=True)"
)
_PROGRAM = """
def main():
    {start}
    engine.generate('The capital of France is', {{'temperature': 0, 'max_new_tokens': 1}})
    import os, psutil
    own = psutil.Process(os.getpid())
    tree = [own, *own.children(recursive=True)]
    cpu = sum(sum(process.cpu_times()[:2]) for process in tree)
    print('first token', cpu, flush=True)
    engine.shutdown()

if __name__ == '__main__':
    main()
"""

VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "sglang.Engine": (_PLAIN, {}),
    "create_engine, fast start off": (_FAST, {"RAG_PIPELINE_FAST_START": "off"}),
    "create_engine, FlashInfer imported": (_FAST, {"SGLANG_IS_FLASHINFER_AVAILABLE": "true"}),
    "create_engine": (_FAST, {}),
}
"""Name, program and environment of each variant."""


def _start_once(model: str, name: str, folder: str) -> tuple[float, float]:
    start, environment = VARIANTS[name]
    program = os.path.join(folder, "start.py")  # noqa: PTH118
    with open(program, "w") as file:  # noqa: PTH123
        file.write(_PROGRAM.format(start=start.format(model=model)))
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, program],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    wall = cpu = 0.0
    for line in process.stdout:
        if line.startswith("first token"):
            wall, cpu = time.perf_counter() - begin, float(line.split()[-1])
    code = process.wait()
    if code != 0 or not wall:
        raise RuntimeError(f"the variant {name!r} ended with exit code {code} and no first token")
    return wall, cpu


def run(model: str, *, repeats: int = 3, variants: list[str] | None = None) -> dict[str, Any]:
    """Measure.

    Parameters
    ----------
    model : str
        Folder in Hugging Face format.
    repeats : int
        Timed starts of each variant; one start that is not timed goes first and fills caches.
    variants : list of str, optional
        Names out of :data:`VARIANTS`; all when not given.

    Returns
    -------
    dict
        ``variants{NAME{wall_s, cpu_s, wall_s_p50, cpu_s_p50}}``, ``repeats``, ``threads``,
        ``load_before``, ``versions``.
    """
    import tempfile

    names = variants or list(VARIANTS)
    load = os.getloadavg()[0]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, keep_measured(lambda: any(times.values())) as end:
        _start_once(model, names[0], folder)
        for repeat in range(repeats):
            for name in names[:: 1 if repeat % 2 == 0 else -1]:
                times[name].append(_start_once(model, name, folder))
                say_progress(f"{name}: {times[name][-1]}")
    return {
        "variants": {
            name: {
                "wall_s": [wall for wall, _ in rows],
                "cpu_s": [cpu for _, cpu in rows],
                "wall_s_p50": statistics.median(wall for wall, _ in rows),
                "cpu_s_p50": statistics.median(cpu for _, cpu in rows),
            }
            for name, rows in times.items()
            if rows
        },
        "repeats": repeats,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load_before": load,
        "versions": versions_of("rag-pipeline", "sglang", "torch"),
    } | end.report()


def table(report: dict[str, Any]) -> str:
    """The report as text, one line per variant."""
    lines = []
    for name, row in report["variants"].items():
        walls = ", ".join(f"{value:.1f}" for value in row["wall_s"])
        wall, cpu = row["wall_s_p50"], row["cpu_s_p50"]
        lines.append(f"{name:36} wall {wall:6.1f} s ({walls})  CPU {cpu:6.1f} s")
    lines.append(
        f"{report['repeats']} starts each, load before {report['load_before']:.1f}, medians"
    )
    return "\n".join(lines)


@refusals_in_one_line
def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.startup", __doc__)
    parser.add_argument("--model", required=True, help="folder in Hugging Face format")
    parser.add_argument("--repeats", type=int, default=3, help="timed starts of each variant")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="all when left out")
    add_json_option(parser)
    given = parser.parse_args(words)
    if given.repeats < 1:
        parser.error(f"--repeats is {given.repeats}; allowed is 1 or more")
    report = run(given.model, repeats=given.repeats, variants=given.variants)
    return print_report(report, table, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
