from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from retrievers import Embedder, RetrievalError

TEXTS = ["a short text", "something else entirely " * 20, "third", "", "fünf 日本"] * 8


def test_equals_sentence_transformers(embedder_folder: Path, real_embedder: Embedder) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(embedder_folder), device="cpu")
    expected = model.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(real_embedder.encode_documents(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(real_embedder.encode_query(TEXTS[0]), expected[0], atol=1e-5)
    done: list[int] = []
    vectors = real_embedder.encode_documents(TEXTS, progress=done.append)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert sum(done) == len(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors.dtype == np.float32
    assert real_embedder.dim == 384
    assert real_embedder.encode_documents([]).shape == (0, 384)


def test_loading_prints_nothing(embedder_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    Embedder(embedder_folder, device="cpu").encode_query("text")
    assert capsys.readouterr() == ("", "")


def test_prompts_are_put_before_the_right_side(
    embedder_folder: Path, real_embedder: Embedder
) -> None:
    prompted = Embedder(
        embedder_folder, device="cpu", query_prompt="query: ", document_prompt="passage: "
    )
    plain = real_embedder.encode_documents(["query: x", "passage: x"])
    np.testing.assert_allclose(prompted.encode_query("x"), plain[0], atol=1e-5)
    np.testing.assert_allclose(prompted.encode_documents(["x"])[0], plain[1], atol=1e-5)
    assert prompted.fingerprint != real_embedder.fingerprint


def test_fingerprint_follows_what_decides_the_vectors(
    embedder_folder: Path, real_embedder: Embedder, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(embedder_folder, copy)
    assert Embedder(copy).fingerprint == real_embedder.fingerprint
    (copy / "README.md").write_text("changed")
    assert Embedder(copy).fingerprint == real_embedder.fingerprint
    assert Embedder(copy, dtype="bfloat16").fingerprint != real_embedder.fingerprint
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert Embedder(copy).fingerprint != real_embedder.fingerprint


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    for make, message in (
        (lambda: Embedder(tmp_path / "missing"), "does not exist"),
        (lambda: Embedder(tmp_path).fingerprint, "holds no model weights"),
        (lambda: Embedder(tmp_path).dim, "cannot load the embedder"),
        (lambda: Embedder(tmp_path, dtype="int4"), "auto, float32, bfloat16, float16"),
        (lambda: Embedder(tmp_path, batch_size=0), "at least 1"),
    ):
        with pytest.raises(RetrievalError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)
