"""The command: sections in the order of their worth, each written down as soon as it is done."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rag_eval.gpu_check.correctness import check_attention, check_operations
from rag_eval.gpu_check.engine import try_engine
from rag_eval.gpu_check.kernels import Shape, time_attention
from rag_eval.gpu_check.prefill import TINY, LlamaShape, time_prefill
from rag_pipeline.whole_file import write_whole

Section = Callable[[], Iterator[dict[str, Any]]]


def main(words: Sequence[str] | None = None) -> int:
    """Run all sections; returns 0 where every number agrees with the reference.

    Parameters
    ----------
    words : sequence of str, optional
        Command line without the program; that of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m rag_eval.gpu_check", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for gpu_check.json and .txt"
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run")
    parser.add_argument("--small", action="store_true", help="toy sizes, for a dry run")
    parser.add_argument("--budget-s", type=float, default=440.0, help="start nothing after this")
    parser.add_argument(
        "--engine-s",
        type=float,
        default=120.0,
        help="most seconds for the real SGLang, behind all others and within the budget; 0 leaves it out",
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs per number")
    given = parser.parse_args(words)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none; give --device cpu --small for a dry run")
    device = torch.device(given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": describe(device), "small": given.small, "sections": {}}
    began = time.monotonic()
    sections = _sections(device, given.small, given.repeats)
    if given.engine_s > 0:

        def engine() -> Iterator[dict[str, Any]]:
            left = began + given.budget_s - time.monotonic()
            return try_engine(given.device, min(given.engine_s, left))

        sections["the real SGLang"] = engine
    for name, section in sections.items():
        if time.monotonic() - began > given.budget_s:
            report["sections"][name] = {"skipped": "no time left"}
            continue
        report["sections"][name] = _run(section, began + given.budget_s)
        report["seconds"] = round(time.monotonic() - began, 1)
        write_whole(given.out / "gpu_check.json", json.dumps(report, indent=1) + "\n")
        write_whole(given.out / "gpu_check.txt", table(report) + "\n")
    print(table(report))
    return 1 if wrong(report) else 0


def _sections(device: torch.device, is_small: bool, repeats: int) -> dict[str, Section]:
    lengths = (256, 512) if is_small else (4096, 8192, 32_768)
    heads = Shape(q_heads=4, kv_heads=2, dim=16) if is_small else Shape()
    llama = TINY if is_small else LlamaShape()
    prompts = (256,) if is_small else (8192, 32_768)
    return {
        "attention against fp32": lambda: check_attention(device),
        "operations against fp32": lambda: check_operations(device),
        "attention at the shape of Llama-8B": lambda: time_attention(
            heads, lengths, device, repeats
        ),
        "prefill of a random Llama-8B": lambda: time_prefill(llama, prompts, device, repeats),
    }


def _run(section: Section, until: float) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    try:
        for entry in section():
            entries.append(entry)
            if time.monotonic() > until:
                return {"entries": entries, "stopped": "no time left"}
    except Exception as error:
        return {"entries": entries, "failed": repr(error)[:500]}
    return {"entries": entries}


def describe(device: torch.device) -> dict[str, Any]:
    """Name the hardware, the date and the versions."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "flashinfer"):
        try:
            found[name] = __import__(name).__version__
        except Exception as error:
            found[name] = f"not there: {type(error).__name__}"
    return found


def wrong(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries that do not agree with the reference, and sections that broke."""
    found = []
    for name, section in report["sections"].items():
        if "failed" in section:
            found.append({"what": name, "failed": section["failed"]})
        for entry in section.get("entries", ()):
            if entry.get("ok") is False or "failed" in entry:
                found.append(entry)
    return found


def table(report: dict[str, Any]) -> str:
    """All entries as text, one line each."""
    lines = [" · ".join(f"{name} {value}" for name, value in report["machine"].items())]
    for name, section in report["sections"].items():
        lines.append(f"\n{name}")
        for entry in section.get("entries", ()):
            lines.append("  " + "  ".join(_cell(key, value) for key, value in entry.items()))
        lines += [
            f"  {key}: {section[key]}" for key in ("failed", "stopped", "skipped") if key in section
        ]
    bad = wrong(report)
    lines.append(f"\n{len(bad)} wrong" if bad else "\nall agree")
    return "\n".join(lines)


def _cell(name: str, value: object) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown if name == "what" else f"{name} {shown}"
