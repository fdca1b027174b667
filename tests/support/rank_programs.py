"""Two processes that are the tensor-parallel ranks of one engine, and what each writes of what it saw."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

FUSION = Path(__file__).parents[1] / "fusion"


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    program: str,
    case: dict[str, Any],
    tmp_path: Path,
    warm_start: Any,
    engines: int = 1,
    *,
    count: int = 2,
    may_fail: bool = False,
    **variables: str,
) -> list[Any]:
    """Run a program of ``tests/fusion`` as rank 0 and as rank 1, or of so many; what they wrote, in this order.

    Its words are RANK CASE.json OUT.json; `case` is what all read. It may start so many engines, one after another.
    `variables` are added to the environment. Where they `may_fail`, what a failed rank printed stands for what it wrote.
    """
    given = tmp_path / "case.json"
    ports = [free_port() for _ in range(engines)]
    given.write_text(json.dumps(case | {"ports": ports, "ranks": count}))
    outs = [tmp_path / f"rank{rank}.json" for rank in range(count)]
    ranks = [
        warm_start.popen(
            [sys.executable, FUSION / program, *map(str, (rank, given, outs[rank]))],
            environment=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            stdout=tmp_path / f"log{rank}.txt",
        )
        for rank in range(count)
    ]
    try:
        codes = [one.wait(timeout=240) for one in ranks] if may_fail else ended(ranks)
    finally:
        for process in ranks:
            process.kill_group()
    logs = [tmp_path / f"log{rank}.txt" for rank in range(count)]
    assert may_fail or not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
    return [
        json.loads(out.read_text()) if code == 0 else log.read_text()
        for code, out, log in zip(codes, outs, logs, strict=True)
    ]


def ended(ranks: list[Any], limit_s: float = 400.0) -> list[int | None]:
    """Exit codes when all ranks have ended or one has failed, for which the others would wait."""
    deadline = time.monotonic() + limit_s
    while True:
        codes = [process.poll() for process in ranks]
        if any(codes) or None not in codes:
            return codes
        assert time.monotonic() < deadline, "the ranks do not end"
        time.sleep(0.05)


class RankProgram:
    """What a rank was started with."""

    def __init__(self) -> None:
        rank, given, out = sys.argv[1:4]
        self.rank, self._out = int(rank), Path(out)
        self.case = json.loads(Path(given).read_text())
        self._ranks = int(self.case["ranks"])
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(self._ranks)))
        self._ports = iter(self.case["ports"])

    def engine(self, folder: str, **settings: Any) -> Any:
        """Start this rank of an engine, which is driven by hand; one at a time."""
        spec = importlib.util.spec_from_file_location("local", FUSION / "conftest.py")
        assert spec is not None
        assert spec.loader is not None
        local = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(local)
        return local.LocalEngine(
            folder,
            tp_size=self._ranks,
            nccl_port=next(self._ports),
            world_rank=self.rank,
            **settings,
        )

    def write(self, seen: Any) -> None:
        """Leave what this rank saw."""
        self._out.write_text(json.dumps(seen))
