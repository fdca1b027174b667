"""``rag-pipeline doctor``: what really runs, told by the running engine, not by us."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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
    folder = _server_model(server) if server else resolve_llm_shown(model).path
    activation = _ask_server(server) if server else _ask_engine(model, folder)
    if not activation["active"]:
        problems.append("the plugin is not active in the running engine")
    if activation["unapplied"]:
        problems.append(f"hooks not applied: {', '.join(activation['unapplied'])}")
    if activation["self_check"].startswith("failed"):
        problems.append(f"fusion is off, its self-check {activation['self_check']}")
    gate = gate_facts(folder, activation["attention_class"], name=str(folder) if server else model)
    report = {
        **facts,
        "engine": activation,
        "gate": gate,
        "prompt_date": _prompt_date(folder),
        "ok": not problems,
        "problems": problems,
    }
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


def gate_facts(folder: Path, attention: str, *, name: str) -> dict[str, Any]:
    """The last model gate of a model, as kept by ``rag-pipeline eval gate``.

    Parameters
    ----------
    folder : Path
        Model folder; one that is not on this machine has no gate here.
    attention : str
        Attention class of the running engine: a gate of another one is stale.
    name : str
        Model as the user would give it to the gate.

    Returns
    -------
    dict
        ``status`` (``passed``, ``failed``, ``stale`` or ``none``), ``hint`` (the command that makes
        a new one, empty when there is no need), and of the gate ``date``, ``policies``, ``stale``
        and ``file``.
    """
    from rag_eval.gate import last_gate

    hint = f"rag-pipeline eval gate --model {name}"
    gate = last_gate(folder, attention) if folder.is_dir() else None
    if gate is None:
        return {"status": "none", "hint": hint, "policies": {}}
    status = "stale" if gate["stale"] else "passed" if gate["passed"] else "failed"
    return {**gate, "status": status, "hint": hint if gate["stale"] else ""}


def _server_model(url: str) -> Path:
    """Folder of the model that a server serves; it may lie on another machine."""
    from rag_pipeline.generation import ServerBackend

    backend = ServerBackend(url)
    try:
        return Path(backend.model_path)
    finally:
        backend.close()


def _prompt_date(folder: Path) -> str:
    """What prompts for a model say of the date; a server's model may lie on another machine."""
    from rag_pipeline import ModelError, ModelTokenizer

    try:
        return ModelTokenizer.load(folder).date_policy
    except ModelError:
        return "not known: the model's folder is not on this machine"


def _ask_engine(model: str, folder: Path) -> dict[str, Any]:
    from rag_pipeline.sglang_plugin import activation_of, create_engine

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
        ("fusion", "on" if engine["fusion_on"] else f"OFF: {engine['fusion_off_reason']}"),
        ("fusion self-check", engine["self_check"]),
        ("date in prompts", report["prompt_date"]),
    ]
    for name, value in [*rows, *_gate_rows(report["gate"])]:
        print(f"{name:24} {value}")
    say("all good" if report["ok"] else f"{len(report['problems'])} problem(s)")


def _gate_rows(gate: dict[str, Any]) -> list[tuple[str, str]]:
    if gate["status"] == "none":
        return [
            ("model gate", f"none was run; `{gate['hint']}` checks this model before it serves")
        ]
    line = f"{gate['status']}, {gate['date']}"
    if gate["stale"]:
        line += f" ({'; '.join(gate['stale'])}); run `{gate['hint']}`"
    rows = [("model gate", line)]
    for name, verdict in gate["policies"].items():
        why = f" ({', '.join(verdict['failed'])})" if verdict["failed"] else ""
        rows.append((f"  {name}", f"{'pass' if verdict['passed'] else 'FAIL'}{why}"))
    return rows
