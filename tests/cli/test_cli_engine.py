"""The commands that start a real engine, as a user starts them: in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

TEXTS = {
    "lighthouse": "The lighthouse of Port Ellery was painted green in 1931 by its keeper, Ada Moss.",
    "bridge": "The stone bridge at Larne has seven arches and was finished in the year 1788.",
    "orchard": "The orchard behind the mill holds forty pear trees, planted for the cider press.",
}


def run_command(*words: str) -> tuple[dict[str, Any], str]:
    """Run ``rag-pipeline``; returns its JSON object and what it said on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from rag_pipeline.cli import main; sys.exit(main())"]
        + list(words),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout
    return json.loads(lines[0]), done.stderr


def test_ask_streams_and_prints_the_contract(tmp_path: Path, smollm2_path: Path) -> None:
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    index = tmp_path / "index"
    report, _ = run_command("ingest", str(tmp_path), "--index", str(index), "--json")
    assert report["documents_added"] == len(TEXTS)
    words = ["ask", "What colour is the lighthouse of Port Ellery?", "--index", str(index)]
    answer, streamed = run_command(
        *words, "--top-k", "1", "--max-new-tokens", "24", "--stream", "--json"
    )
    assert set(answer) >= {"answer", "sources", "usage", "timing", "policy", "ratio"}
    assert "green" in answer["answer"].lower()
    assert answer["answer"] in streamed
    assert answer["sources"][0]["title"] == "lighthouse"
    assert len(answer["sources"]) == 1
    usage = answer["usage"]
    parts = ("exact_prefix_tokens", "reused_tokens", "recomputed_tokens", "fresh_tokens")
    assert sum(usage[part] for part in parts) == usage["prompt_tokens"]
    assert 0 < usage["completion_tokens"] <= 24
    assert 0 < answer["timing"]["ttft_s"] <= answer["timing"]["total_s"]


def test_doctor_reports_the_running_engine() -> None:
    report, _ = run_command("doctor", "--json")
    assert report["ok"], report["problems"]
    assert report["engine"]["active"]
    assert report["engine"]["unapplied"] == []
    assert report["engine"]["sglang_version"] == "0.5.23"
    assert report["engine"]["attention_backend"]
