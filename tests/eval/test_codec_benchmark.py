"""The codec benchmark without its engines: what it refuses, and the folders that it makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chunk_cache import ChunkKey, ChunkKV, StoreFolder, codec_named
from rag_eval.benchmarks import codecs
from rag_eval.benchmarks.codec_store import copy_with_codec
from rag_eval.benchmarks.codecs import CodecBenchConfig
from rag_eval.errors import EvalError


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"codecs": "fp8,plain"}, "give plain first"),
        ({"codecs": "plain,zip"}, "give plain first"),
        ({"modes": "full"}, "at least one that reuses"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(given, told):
    with pytest.raises(EvalError, match=told):
        CodecBenchConfig(**given)


def test_a_copy_holds_what_the_codec_gives_back_and_says_so(tmp_path):
    ids = np.arange(64, dtype=np.int32)
    k, v = torch.randn(2, 64, 3, 32).bfloat16(), torch.randn(2, 64, 3, 32).bfloat16()
    key = ChunkKey.of("0" * 32, ids)
    source = StoreFolder(tmp_path / "source", create=True)
    assert source.put(ChunkKV(key=key, token_ids=ids, base_position=5, k=k, v=v))
    told = copy_with_codec(tmp_path / "source", tmp_path / "kivi4", "kivi4")
    # Half a byte a value, and 2 ends of 2 bytes for each 32 values.
    assert told["bytes_per_token"] == 2 * 2 * 3 * 32 * (0.5 + 4 / 32)
    assert told["size_vs_plain"] == 0.3125
    original = source.read(key)
    copied = StoreFolder(tmp_path / "kivi4").read(key)
    assert original is not None
    assert original.is_lossless
    assert copied is not None
    assert copied.codec == "kivi4"
    codec = codec_named("kivi4")
    wanted = codec.decode(codec.encode(original.layer(1)), torch.bfloat16)
    assert torch.equal(copied.layer(1).k, wanted.k)
    assert torch.equal(copied.layer(1).v, wanted.v)


def test_a_record_that_the_codec_refuses_is_not_measured_as_if_it_had_been(tmp_path):
    ids = np.arange(8, dtype=np.int32)
    kv = torch.full((1, 8, 1, 4), float("inf"))
    folder = StoreFolder(tmp_path / "source", create=True)
    folder.put(
        ChunkKV(key=ChunkKey.of("0" * 32, ids), token_ids=ids, base_position=0, k=kv, v=kv.clone())
    )
    with pytest.raises(EvalError, match="fp8 refused"):
        copy_with_codec(tmp_path / "source", tmp_path / "fp8", "fp8")


@pytest.mark.parametrize(("words", "begins"), [(["--json"], "{"), ([], "plain ")])
def test_the_command_prints_a_table_or_json(monkeypatch, capsys, words, begins):
    distances = {"mean": 0.1, "se": 0.01}
    row = {"bytes_per_token": 23040.0, "encode_mb_s": 1.0, "decode_mb_s": 1.0}
    row["reuse"] = {"kl_to_plain": distances, "kl_to_full": distances}

    def run(config, progress):
        return {"codecs": {"plain": row}, "config": {"modes": config.modes}, "n": 8}

    monkeypatch.setattr(codecs, "run", run)
    assert codecs.main([*words, "--modes", "reuse", "--codecs", "plain"]) == 0
    assert capsys.readouterr().out.startswith(begins)


def test_a_wrong_number_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        codecs.main(["--limit", "0"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "limit is 0" in line
