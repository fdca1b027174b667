"""GGUF to a folder: real files, real processes, a really full disk."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from warm import WarmStart

from rag_pipeline.errors import ModelError
from rag_pipeline.models import resolve_llm, verify_model
from rag_pipeline.models.converted import MANIFEST, is_complete
from rag_pipeline.models.packaged import LLMS, packaged_file

HIDDEN, LAYERS, HEADS, FFN = 64, 2, 4, 96
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def byte_tokens() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE (GPT-2's table)."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {}, 0
    for byte in range(256):
        table[byte] = chr(byte) if byte in keep else chr(256 + (extra := extra + 1) - 1)
    return [table[byte] for byte in range(256)]


def write_llama(path: Path, *, arch: str = "llama", seed: int = 0) -> Path:
    """Write a tiny but complete GGUF model with random weights."""
    rng = np.random.default_rng(seed)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_tokens(), "th"]
    writer = GGUFWriter(path, arch)
    writer.add_name("Tiny test model")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    kinds = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.05, shape).astype(np.float16))

    tensor("token_embd.weight", len(tokens), HIDDEN)
    tensor("output.weight", len(tokens), HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{part}.weight", HIDDEN, HIDDEN)
        tensor(f"blk.{layer}.ffn_gate.weight", FFN, HIDDEN)
        tensor(f"blk.{layer}.ffn_up.weight", FFN, HIDDEN)
        tensor(f"blk.{layer}.ffn_down.weight", HIDDEN, FFN)
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{part}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("RAG_PIPELINE_HOME", str(folder))
    return folder


def left_behind(home: Path) -> list[str]:
    return [p.name for p in (home / "models").glob("*") if not p.name.endswith(".lock")] + [
        p.name for p in (home / "models").glob(".*") if p.is_dir()
    ]


def test_gguf_file_becomes_a_checked_folder_and_is_reused(tmp_path: Path, home: Path) -> None:
    import torch
    from gguf import GGUFReader
    from safetensors.torch import load_file

    source = write_llama(tmp_path / "tiny.gguf")
    steps: list[tuple[str, float]] = []
    resolved = resolve_llm(str(source), progress=lambda step, share: steps.append((step, share)))
    assert resolved.source == "gguf"
    assert resolved.path.parent == home / "models"
    assert resolved.path.name.startswith("tiny-")
    shares = [share for _, share in steps]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0

    weights = load_file(resolved.path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    written = {tensor.name: tensor.data for tensor in GGUFReader(source).tensors}
    expected = torch.tensor(np.asarray(written["blk.1.ffn_up.weight"])).to(torch.bfloat16)
    assert torch.equal(weights["model.layers.1.mlp.up_proj.weight"], expected)
    assert json.loads((resolved.path / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (resolved.path / "chat_template.jinja").read_text() == CHAT
    verify_model(resolved.path)

    # Re-use: nothing is reported, nothing is written; the same bytes elsewhere count as the same.
    before = (resolved.path / "model.safetensors").stat().st_mtime_ns
    again: list[str] = []
    copy = shutil.copy(source, tmp_path / "tiny-copy.gguf")
    assert resolve_llm(str(source), progress=lambda step, share: again.append(step)) == resolved
    assert (resolved.path / "model.safetensors").stat().st_mtime_ns == before
    assert again == []
    assert Path(copy).read_bytes() == source.read_bytes()

    # Damage that the quick check sees (size) is mended by the next use ...
    with (resolved.path / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert not is_complete(resolved.path)
    with pytest.raises(ModelError, match="bytes instead of"):
        verify_model(resolved.path)
    assert resolve_llm(str(source)).path == resolved.path
    verify_model(resolved.path)
    # ... and damage of the same size in a big file is seen by the full check.
    config = resolved.path / "config.json"
    config.write_text(config.read_text().replace("llama", "lLama"))
    with pytest.raises(ModelError, match=r"config\.json does not match its checksum"):
        verify_model(resolved.path)


def test_unsupported_architecture_is_refused_before_any_weights_are_read(
    tmp_path: Path, home: Path
) -> None:
    source = write_llama(tmp_path / "odd.gguf", arch="perceiver9000")
    with pytest.raises(ModelError, match=r"architecture 'perceiver9000'.*supported are .*llama"):
        resolve_llm(str(source))
    assert left_behind(home) == []


@pytest.mark.parametrize("keep", [10, 2_000, 0.5, -1])
def test_truncated_file_is_refused(tmp_path: Path, home: Path, keep: float) -> None:
    source = write_llama(tmp_path / "t.gguf")
    size = source.stat().st_size
    os.truncate(source, int(size * keep if isinstance(keep, float) else keep % size))
    with pytest.raises(ModelError, match="truncated") as error:
        resolve_llm(str(source))
    assert "\n" not in str(error.value)
    assert left_behind(home) == []


def test_other_files_are_refused(tmp_path: Path, home: Path) -> None:
    other = tmp_path / "model.gguf"
    other.write_bytes(b"PK\x03\x04 a zip, not a model")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        resolve_llm(str(other))


def test_too_little_space_is_said_before_the_work(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_llama(tmp_path / "t.gguf")
    usage = shutil.disk_usage(tmp_path)
    # The real figures of the disk with less free than the headroom that is always asked for.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(ModelError, match="MB free; free some or set RAG_PIPELINE_HOME"):
        resolve_llm(str(source))
    assert left_behind(home) == []


CONVERT = """
import sys
from rag_pipeline.errors import ModelError
from rag_pipeline.models import resolve_llm
steps = []
try:
    found = resolve_llm(sys.argv[1], progress=lambda step, share: steps.append(step))
except ModelError as error:
    print("ERROR", error)
else:
    print("OK", found.path, "Writing safetensors" in steps)
"""


# Every write beyond 64 kB fails as on a full disk; the weights are larger.
SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, 64_000))"


def test_disk_that_fills_up_midway_leaves_nothing_behind(
    tmp_path: Path, home: Path, warm_start: WarmStart
) -> None:
    source = write_llama(tmp_path / "t.gguf")
    words = [sys.executable, "-c", f"{SMALL_FILES}\n{CONVERT}", source]
    done = warm_start.run(words, environment=os.environ)
    assert done.stdout.startswith("ERROR no disk space left in"), done.stdout + done.stderr
    assert "nothing was kept" in done.stdout
    assert left_behind(home) == []


def test_two_processes_share_one_conversion(
    tmp_path: Path, home: Path, warm_start: WarmStart
) -> None:
    source = write_llama(tmp_path / "t.gguf")
    # What a process that was killed while converting leaves; the next one clears it away.
    words = [sys.executable, "-c", CONVERT, source]
    outputs = [tmp_path / name for name in ("one.txt", "two.txt")]
    pair = [
        warm_start.popen(words, environment=os.environ, stdout=out, stderr=out.with_suffix(".err"))
        for out in outputs
    ]
    for process in pair:
        process.wait(timeout=240)
    lines = [out.read_text().split() for out in outputs]
    assert [line[0] for line in lines] == ["OK", "OK"], outputs
    assert lines[0][1] == lines[1][1]
    assert sorted(line[2] for line in lines) == ["False", "True"]
    assert left_behind(home) == [Path(lines[0][1]).name]
    verify_model(Path(lines[0][1]))


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, home: Path) -> None:
    source = write_llama(tmp_path / "t.gguf")
    target = resolve_llm(str(source)).path
    shutil.rmtree(target)
    stale = target.parent / f".{target.name}.tmp-killed"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    assert resolve_llm(str(source)).path == target
    assert left_behind(home) == [target.name]


def test_packaged_model_is_complete_and_says_sensible_things(smollm2_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = json.loads((smollm2_path / MANIFEST).read_text())
    assert set(manifest["files"]) >= {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert manifest["source"]["bytes"] == packaged_file(LLMS["smollm2-135m"]).stat().st_size
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"] if not isinstance(ids, torch.Tensor) else ids
    out = model.generate(ids, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(out[0, ids.shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")  # it stops by itself: the generation config is right
