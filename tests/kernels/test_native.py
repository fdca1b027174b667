"""Kernels in C++: any shape and number of threads, the same bits; built once, and torch where that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import TOLERANCE

import rag_kernels
from rag_kernels import (
    BlockMask,
    RequestBlocks,
    RotarySpec,
    mean_shift_inplace,
    plan_mean_shift,
    plan_position_causal,
    position_causal_attention,
    query_attention_mass,
)
from rag_kernels.native.build import SOURCES, BuildError, built_library
from rag_kernels.native.library import load_library

needs_library = pytest.mark.skipif(
    load_library() is None, reason="the library cannot be built on this machine"
)


def attend(kernel, case, threads=1, **more):
    """Random rows, one of them alone in its request, none in another, twice the same position in a third."""
    q_heads, kv_heads, dim, dtype, mask = case
    g = torch.Generator().manual_seed(7)
    lengths = [611, 1, 40, 300]
    slots = list(torch.randperm(2000, generator=g)[: sum(lengths)].split(lengths))
    positions = [
        torch.randperm(611, generator=g)[:200],
        torch.tensor([0]),
        torch.empty(0, dtype=torch.int64),
        torch.tensor([5, 299, 5, 5, 64, 0, 299]),
    ]
    k, v = torch.randn(2, 2000, kv_heads, dim, generator=g).to(dtype)
    q = torch.randn(208, q_heads, dim, generator=g).to(dtype)
    blocks = [
        RequestBlocks(
            allowed=torch.rand(heads, -(-n // 32), -(-n // key_block), generator=g) < 0.4,
            query_block=32,
            key_block=key_block,
        )
        for n, heads, key_block in zip(
            lengths, (1, kv_heads, q_heads, q_heads), (64, 64, 19, 48), strict=True
        )
    ]
    plan = plan_position_causal(
        positions,
        slots,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        kernel=kernel,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return position_causal_attention(
            q,
            k,
            v,
            plan,
            dim**-0.5,
            mask=BlockMask(requests=tuple(blocks)) if mask else None,
            **more,
        )
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim"),
    [
        (9, 3, 64),
        (2, 2, 80),
        (8, 1, 128),
        (6, 2, 96),
        (4, 1, 256),
        (7, 1, 40),
        (5, 1, 17),
        (12, 1, 320),
        (2, 1, 576),
    ],
)
def test_every_shape_against_the_reference(q_heads, kv_heads, dim, dtype, mask):
    case = (q_heads, kv_heads, dim, dtype, mask)
    got, want = attend("cpp", case), attend("reference", case)
    # Logits of so many products are off by as many roundings.
    wide = max(1.0, dim / 160)
    near = {name: wide * by for name, by in TOLERANCE[dtype].items()}
    torch.testing.assert_close(got, want, **near)


@needs_library
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("window", [None, 70])
def test_threads_change_no_bit(mask, window):
    case = (9, 3, 64, torch.bfloat16, mask)
    one = attend("cpp", case, sliding_window=window)
    for threads in (2, 5):
        assert torch.equal(attend("cpp", case, threads, sliding_window=window), one)


@needs_library
def test_a_row_does_not_depend_on_the_rows_beside_it():
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    slots = torch.randperm(700)
    k, v = torch.randn(2, 700, 2, 64).bfloat16()
    q = torch.randn(700, 4, 64).bfloat16()
    plan = plan_position_causal([torch.arange(700)], [slots], kernel="cpp", **heads)
    every = position_causal_attention(q, k, v, plan, 0.125)
    for rows in (torch.tensor([699]), torch.tensor([3, 600, 41, 42]), torch.randperm(700)[:99]):
        some = plan_position_causal([rows], [slots], kernel="cpp", **heads)
        assert torch.equal(position_causal_attention(q[rows], k, v, some, 0.125), every[rows])


@needs_library
@pytest.mark.parametrize(
    ("q_type", "kv_type"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_queries_of_another_type_and_tensors_that_are_parts_of_others(q_type, kv_type):
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    q = torch.randn(50, 8, 32).to(q_type)[:, 2:6]
    k, v = torch.randn(2, 60, 5, 2, 32).to(kv_type)[:, :, 3]
    got, want = (
        position_causal_attention(
            q,
            k,
            v,
            plan_position_causal(
                [torch.arange(50)],
                [torch.randperm(60, generator=torch.Generator().manual_seed(1))[:50]],
                kernel=name,
                **heads,
            ),
            0.2,
        )
        for name in ("cpp", "reference")
    )
    torch.testing.assert_close(got, want, **TOLERANCE[q_type])


@needs_library
def test_large_logits_and_infinities_in_hidden_rows():
    """Weights far below the largest vanish, and nothing overflows."""
    k = torch.tensor([100.0, -100.0, 0.0, 99.0]).view(4, 1, 1).repeat(1, 1, 8)
    v = torch.arange(4.0).view(4, 1, 1).repeat(1, 1, 8)
    plan = plan_position_causal(
        [torch.arange(4)],
        [torch.arange(4)],
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=8,
        kernel="cpp",
    )
    got = position_causal_attention(torch.full((4, 1, 8), 50.0), k, v, plan, 1.0)
    assert torch.equal(got[:, 0, 0], torch.zeros(4))


@needs_library
def test_a_slot_outside_of_the_pool_is_told():
    plan = plan_position_causal(
        [torch.tensor([1])],
        [torch.tensor([0, 9])],
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=8,
        kernel="cpp",
    )
    pool = torch.zeros(9, 1, 8)
    with pytest.raises(IndexError, match="slot 9 for a pool of 9 slots"):
        position_causal_attention(torch.zeros(1, 1, 8), pool, pool, plan, 1.0)
    with pytest.raises(IndexError, match=r"slots 0\.\.9 for a pool of 9"):
        query_attention_mass(
            torch.zeros(1, 1, 8), pool, torch.tensor([0, 9]), torch.tensor([1]), 2, 1.0
        )


@needs_library
def test_a_shift_reads_and_writes_nothing_outside_of_its_tensors():
    k_pool, v_pool = torch.zeros(9, 1, 8), torch.zeros(8, 1, 8)
    spec = RotarySpec.from_inv_freq(10000.0 ** -(torch.arange(0, 8, 2) / 8))
    shift = plan_mean_shift([(0, 9)], torch.tensor([3, 5, 7]), torch.arange(9), spec)
    new = torch.ones(3, 1, 8)
    with pytest.raises(IndexError, match=r"slots 0\.\.8 for a pool of 8"):
        mean_shift_inplace(k_pool, v_pool, new, new, shift)
    for short in ({"v_new": new[:2]}, {"k_old": new[:2], "v_old": new}):
        rows = {"k_new": new, "v_new": new} | short
        with pytest.raises(IndexError, match="row 2 of 2 rows"):
            mean_shift_inplace(k_pool, k_pool.clone(), plan=shift, **rows)
    assert not bool(k_pool.any())


def test_types_that_it_does_not_read_go_to_torch():
    heads = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    plan = plan_position_causal([torch.arange(9)], [torch.arange(9)], **heads)
    q, k, v = torch.randn(3, 9, 2, 8, dtype=torch.float64)
    got = position_causal_attention(q.float(), k[:, :1], v[:, :1], plan, 0.3)
    want = position_causal_attention(q.float(), k[:, :1].float(), v[:, :1].float(), plan, 0.3)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


@needs_library
@pytest.mark.parametrize("threads", [2, 5])
def test_mass_and_shift_of_several_threads(threads):
    g = torch.Generator().manual_seed(3)
    k, v, new_k, new_v = torch.randn(4, 900, 2, 64, generator=g).bfloat16()
    q, slots = torch.randn(30, 8, 64, generator=g).bfloat16(), torch.randperm(900, generator=g)
    spec = RotarySpec.from_inv_freq(10000.0 ** -(torch.arange(0, 64, 2) / 64))
    rows = torch.arange(0, 900, 7)
    plan = plan_mean_shift([(10, 300), (300, 700)], rows, slots, spec)
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        pools = k.clone(), v.clone()
        mean_shift_inplace(*pools, new_k, new_v, plan)
        mass = query_attention_mass(q, k, slots, torch.arange(870, 900), 900, 0.125)
        found.append((*pools, mass))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], k)


def run(script, **environment):
    roots = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": roots, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_library
def test_a_forked_process_has_threads_of_its_own():
    """As schedulers are made: the parent used one thread, the child takes two."""
    script = (
        "import os, signal, torch, sys; sys.path.insert(0, sys.argv[0]);"
        "from rag_kernels import *;"
        "torch.set_num_threads(1);"
        "plan = lambda: plan_position_causal([torch.arange(300)], [torch.arange(300)], num_q_heads=4,"
        " num_kv_heads=1, head_dim=64, kernel='cpp');"
        "pool = torch.ones(300, 1, 64); q = torch.ones(300, 4, 64);"
        "call = lambda: position_causal_attention(q, pool, pool, plan(), 0.1);"
        "call(); child = os.fork();\n"
        "if child == 0:\n"
        " signal.alarm(30); torch.set_num_threads(2)\n"
        " os._exit(0 if call().sum() == 300 * 4 * 64 else 3)\n"
        "print(os.waitpid(child, 0)[1])"
    )
    out, errors = run(script).communicate(timeout=120)
    assert out.strip() == "0", errors


WITHOUT = "amx" if torch.cpu._is_amx_tile_supported() else "cpu"
"""What ``auto`` takes where the library is not."""


def test_without_a_compiler_torch_computes_and_it_is_said_once(tmp_path):
    script = (
        "import logging, torch; logging.basicConfig();"
        "from rag_kernels import *;"
        "make = lambda **k: plan_position_causal([torch.arange(9)], [torch.arange(9)], num_q_heads=1,"
        " num_kv_heads=1, head_dim=8, **k);"
        "make(); print(make().kernel);\n"
        "try: make(kernel='cpp')\n"
        "except ValueError as error: print(error)"
    )
    out, errors = run(script, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path)).communicate(
        timeout=120
    )
    assert out.splitlines() == [
        WITHOUT,
        "attention kernel 'cpp' could not be built on this machine; use 'auto'.",
    ]
    assert errors.count("no C++ compiler (no-such-compiler)") == 1
    out, errors = run(script, RAG_PIPELINE_CPU_KERNELS="torch").communicate(timeout=120)
    assert out.startswith(f"{WITHOUT}\n")
    assert not errors


@needs_library
def test_builders_at_the_same_time_wait_and_what_others_may_write_is_not_run(tmp_path, monkeypatch):
    compiler = tmp_path / "slow"
    calls = tmp_path / "calls"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$1" in --version) echo slow 1; exit;; esac\n'
        f'echo "$@" >> {calls}\n'
        'while [ "$1" != -o ]; do shift; done; sleep 0.3; echo built > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    script = (
        "from pathlib import Path; from rag_kernels.native.build import built_library;"
        f"print(built_library(Path({str(tmp_path / 'kept')!r})))"
    )
    both = [run(script) for _ in range(2)]
    paths = {one.communicate(timeout=120)[0].strip() for one in both}
    assert len(paths) == 1
    assert len(calls.read_text().splitlines()) == len(SOURCES) + 1  # and the link, once
    path = built_library(tmp_path / "kept")
    assert {str(path)} == paths
    assert [one.name for one in path.parent.iterdir()].count(path.name) == 1
    assert not list(path.parent.glob("build-*"))
    path.chmod(0o722)
    with pytest.raises(BuildError, match="can be written by others"):
        built_library(tmp_path / "kept")


def test_a_failed_build_leaves_nothing_and_says_what_the_compiler_said(tmp_path, monkeypatch):
    compiler = tmp_path / "bad"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: no" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match=r"bad failed: x\.cpp:1: error: no"):
        built_library(tmp_path / "kept")
    assert [one.name for one in (tmp_path / "kept").iterdir()] == ["build.lock"]


def test_the_sources_are_shipped():
    import tomllib

    root = Path(rag_kernels.__file__).parents[2]
    shipped = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["rag_kernels"]
    native = {one.suffix for one in (root / "kernels/rag_kernels/native").iterdir()} - {".py", ""}
    assert {f"native/*{suffix}" for suffix in native} <= set(shipped)
