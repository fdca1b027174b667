"""Every route with every kind of key from every kind of page, on a server with keys and on one without."""

from __future__ import annotations

import asyncio
import re

import httpx

from rag_eval.benchmarks.load_run import LoadTarget
from rag_eval.benchmarks.load_server import started_server
from rag_eval.benchmarks.route_matrix import MatrixReport, MatrixTarget, run_matrix
from rag_eval.reliability.figure import Outcome, Plan
from rag_pipeline.server.access import ROUTES


def run(plan: Plan) -> Outcome:
    """Full size: the whole matrix on both servers; a quick or scaled run has the one with keys."""
    outcome = Outcome()
    servers = (True,) if plan.quick or plan.scale < 1 else (True, False)
    outcome.note = "the server with keys only" if len(servers) < 2 else ""
    for keys in servers:
        name = "with_keys" if keys else "without_keys"
        with started_server(plan.model, plan.folder / name, keys=keys) as target:
            matrix = _matrix_target(target)
            _no_route_is_missing(target, outcome)
            report = asyncio.run(_send(matrix))
            _is_well(target, outcome)
        outcome.tried += report.tried
        outcome.worst[f"{name}_tried"] = report.tried
        outcome.worst[f"{name}_not_sent"] = report.skipped
        for kind in ("unlisted_answers", "server_errors", "wrongly_refused"):
            found: list[str] = getattr(report, kind)
            outcome.measure(kind, len(found))
            for line in found:
                outcome.fault(f"{name} {kind}: {line}")
        if not report.tried:
            outcome.fault(f"{name}: nothing was sent")
    return outcome


def _matrix_target(target: LoadTarget) -> MatrixTarget:
    return MatrixTarget(
        url=target.url,
        operator_key=target.operator_key or None,
        tenant_key=next(iter(target.tenants.values()), None),
    )


async def _send(target: MatrixTarget) -> MatrixReport:
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        return await run_matrix(client, target)


def _get(target: LoadTarget, path: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {target.operator_key}"} if target.operator_key else {}
    return httpx.get(target.url + path, headers=headers, timeout=120, trust_env=False)


def _no_route_is_missing(target: LoadTarget, outcome: Outcome) -> None:
    """The list of the matrix holds all that the application says it answers."""
    listed = {_shape(route) for route in ROUTES}
    for path in _get(target, "/openapi.json").json()["paths"]:
        if _shape(path) not in listed:
            outcome.fault(f"{path} is answered and stands in no list")


def _shape(route: str) -> str:
    return re.sub(r"\{[^}]*\}", "{}", route)


def _is_well(target: LoadTarget, outcome: Outcome) -> None:
    answer = _get(target, "/v1/rag/health")
    if answer.status_code != 200 or answer.json()["status"] != "ok":
        outcome.fault(f"in the end the server is not well: {answer.text[:200]}")
