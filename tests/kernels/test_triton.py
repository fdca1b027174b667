"""Triton kernels without a GPU: numbers from the interpreter, and a compile for sm_90a.

Each runs in a process of its own: TRITON_INTERPRET must be set before Triton is imported, and changes what
``triton.jit`` makes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(script: str, **extra: str) -> dict:
    env = (
        {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | extra
        | {"OMP_NUM_THREADS": "1"}
    )
    done = subprocess.run(
        [sys.executable, str(HERE / script)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_interpreted_kernels_agree_with_plain_torch():
    errors = run("interpreted_cases.py", TRITON_INTERPRET="1")
    assert len(errors) == 29
    limits = {
        name: 0.0
        if "bf16" in name or "values" in name or "bits" in name
        else 2e-3
        if "fp16" in name
        else 5e-6
        for name in errors
    }
    assert {n: e for n, e in errors.items() if not e <= limits[n]} == {}


def test_kernels_compile_for_hopper(tmp_path):
    built = run("compiled_cases.py", TRITON_CACHE_DIR=str(tmp_path))
    assert all(case["target"] == "sm_90a" and case["cubin_bytes"] > 0 for case in built.values())
    products = [name for name in built if "attention" in name or "mass" in name]
    assert len(products) == 11
    assert all(built[name]["tensor_core_instructions"] > 0 for name in products)
    assert all(built[name]["wgmma"] > 0 for name in products if "16 rows" not in name)
    assert {
        name: case["spilled_bytes"] for name, case in built.items() if case["spilled_bytes"]
    } == {}
    # Two blocks fit on a Hopper multiprocessor (227 KiB); the gather of K and V is pipelined.
    assert all(case["shared_bytes"] <= 113 * 1024 for case in built.values())
    assert all(case["async_copies"] > 0 for name, case in built.items() if "attention" in name)
