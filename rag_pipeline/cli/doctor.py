"""``rag-pipeline doctor``: what really runs, told by the running engine, not by us."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rag_pipeline.cli.common import resolve_llm_shown
from rag_pipeline.cli.console import emit_json, say, step
from rag_pipeline.config import home_dir
from rag_pipeline.errors import EngineError

PACKAGES = ("sglang", "torch", "transformers", "sentence-transformers", "flashinfer-python")
FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu")


def run_doctor(*, model: str, server: str | None, json_output: bool) -> None:
    """Print the facts; raises :class:`EngineError` (exit code 1) when the plugin is not active."""
    facts = machine_facts()
    problems = list(facts.pop("problems"))
    activation = _ask_server(server) if server else _ask_engine(model)
    if not activation["active"]:
        problems.append("the plugin is not active in the running engine")
    if activation["unapplied"]:
        problems.append(f"hooks not applied: {', '.join(activation['unapplied'])}")
    report = {**facts, "engine": activation, "ok": not problems, "problems": problems}
    if json_output:
        emit_json(report)
    else:
        _print_report(report)
    if problems:
        raise EngineError("; ".join(problems))


def machine_facts() -> dict[str, Any]:
    """Versions, threads, accelerator, and the folder the project writes to."""
    problems = []
    installed = {name: _version(name) for name in PACKAGES}
    faiss = {name: found for name in FAISS_PACKAGES if (found := _version(name))}
    if len(faiss) != 1:
        have = " and ".join(faiss) or "none"
        problems.append(
            f"exactly one of faiss-cpu and faiss-gpu must be installed (found {have}): "
            'they share the folder "faiss"; uninstall both, then install one'
        )
    home = home_dir()
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        problems.append(f"{home} cannot be written; set RAG_PIPELINE_HOME to a folder that can")
    return {
        "rag_pipeline": _version("rag-pipeline"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {**installed, **faiss},
        "home": str(home),
        "home_free_gib": round(shutil.disk_usage(existing).free / 2**30, 1),
        "problems": problems,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _ask_engine(model: str) -> dict[str, Any]:
    from rag_pipeline.sglang_plugin import activation_of, create_engine

    folder = resolve_llm_shown(model).path
    with step(f"Starting SGLang with {model}"):
        engine = create_engine(str(folder))
    try:
        return activation_of(engine).to_json()
    finally:
        engine.shutdown()


def _ask_server(url: str) -> dict[str, Any]:
    from rag_pipeline.sglang_plugin import activation_of

    return activation_of(url).to_json()


def _print_report(report: dict[str, Any]) -> None:
    engine = report["engine"]
    rows = [
        ("rag-pipeline", report["rag_pipeline"]),
        ("python", f"{report['python']} on {report['machine']}"),
        *((name, found or "not installed") for name, found in report["versions"].items()),
        ("home", f"{report['home']} ({report['home_free_gib']} GiB free)"),
        ("engine plugin", "active" if engine["active"] else "NOT ACTIVE"),
        ("engine platform", engine["platform"]),
        ("engine attention", f"{engine['attention_backend']} ({engine['attention_class']})"),
        ("engine versions", f"sglang {engine['sglang_version']}, torch {engine['torch_version']}"),
        ("engine threads", engine["threads"]),
        ("engine hooks", f"{len(engine['hooks'])} applied, {len(engine['unapplied'])} missing"),
    ]
    for name, value in rows:
        print(f"{name:24} {value}")
    say("all good" if report["ok"] else f"{len(report['problems'])} problem(s)")
