"""Every command that writes, on a disk that is full, read-only or broken: one line and nothing left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from chunk_cache import ChunkKey, ChunkKV, StoreFolder
from rag_eval.io_faults import CHANGES, DiskCalls, Fault
from rag_pipeline.cli import main


def store_with_one_chunk(folder: Path) -> str:
    ids = np.arange(1, 9, dtype=np.int32)
    key = ChunkKey.of("ab" * 16, ids)
    kv = torch.zeros(2, 8, 1, 4)
    StoreFolder(folder, create=True).put(
        ChunkKV(key=key, token_ids=ids, base_position=0, k=kv, v=kv.clone())
    )
    return key.digest


def ingest(folder: Path, model: Path) -> list[str]:
    (folder / "tea.txt").write_text("Tea is served at four o'clock.")
    return ["ingest", str(folder / "tea.txt"), "--index", str(folder / "i"), "--model", str(model)]


def init(folder: Path, model: Path) -> list[str]:
    return ["config", "init", str(folder / "rag-pipeline.toml")]


def pin(folder: Path, model: Path) -> list[str]:
    return ["cache", "pin", store_with_one_chunk(folder / "kv"), "--store", str(folder / "kv")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("words", [ingest, init, pin], ids=lambda made: made.__name__)
def test_a_command_that_cannot_write_says_so_in_one_line(
    words: Callable[[Path, Path], list[str]],
    code: int,
    tmp_path: Path,
    smollm2_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = words(tmp_path, smollm2_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    with DiskCalls(tmp_path, fault=Fault(kinds=CHANGES, nth=0, errno=code, lasting=True)) as disk:
        assert main(given) == 1
    assert disk.failed
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1
    assert os.strerror(code) in said[0]
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_output_that_cannot_be_printed_is_one_line() -> None:
    program = "from rag_pipeline.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", program, "config", "show"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: No space left on device")
    assert done.stderr.count("\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")  # click's own answer to a reader that has gone
