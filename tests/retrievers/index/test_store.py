from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from index_parts import DOCUMENTS

from retrievers import (
    CorruptIndexError,
    Document,
    EmbedderMismatchError,
    Index,
    Manifest,
    RetrievalError,
    delete_documents,
    ingest,
)
from retrievers.index_store import EXACT_FILTER_ROWS


def test_round_trip(folder: Path, hash_embedder, splitter) -> None:
    with Index.open(folder, embedder=hash_embedder) as index:
        expected = [chunk for document in DOCUMENTS for chunk in splitter.split(document)]
        assert list(index.chunks()) == expected
        assert index.chunk("d7#1") == expected[22]
        with pytest.raises(RetrievalError, match="holds no chunk 'nope'"):
            index.chunk("nope")
        assert [record.id for record in index.documents()] == [d.id for d in DOCUMENTS]
        assert {record.num_chunks for record in index.documents()} == {3}
        index.verify()


def test_dense_equals_numpy(folder: Path, hash_embedder) -> None:
    with Index.open(folder, embedder=hash_embedder) as index:
        chunks = list(index.chunks())
        matrix = hash_embedder.encode_documents([f"{c.title}\n{c.text}" for c in chunks])
        query = hash_embedder.encode_query("anything")
        order = np.argsort(-(matrix @ query), kind="stable")
        hits = index.retriever("dense").search("anything", k=7)
        assert [hit.chunk.id for hit in hits] == [chunks[i].id for i in order[:7]]
        assert [hit.score for hit in hits] == pytest.approx((matrix @ query)[order[:7]].tolist())
        some = index.retriever("dense").search("anything", k=7, where={"year": {"$lt": 2003}})
        inside = [i for i in order if chunks[i].metadata["year"] < 2003][:7]
        assert [hit.chunk.id for hit in some] == [chunks[i].id for i in inside]
        assert len(index.retriever("dense").search("anything", k=1000)) == 60


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_filter_in_every_mode(mode: str, folder: Path, hash_embedder) -> None:
    with Index.open(folder, embedder=hash_embedder) as index:
        retriever = index.retriever(mode)
        hits = retriever.search("common words", k=50, where={"even": True, "path": "folder/4.txt"})
        assert {hit.chunk.document_id for hit in hits} == {"d4"}
        assert retriever.search("common words", k=5, where={"title": "absent"}) == []
        with pytest.raises(RetrievalError, match="carried by no chunk"):
            retriever.search("common", k=5, where={"colour": "red"})
        with pytest.raises(RetrievalError, match="k must be at least 1"):
            retriever.search("common", k=0)


def test_large_filter_goes_through_faiss(tmp_path: Path, make_hash_embedder, splitter) -> None:
    embedder = make_hash_embedder()
    lines = EXACT_FILTER_ROWS + 600
    documents = [
        Document(id="big", text="\n".join(f"line {i}" for i in range(lines)), title="B"),
        Document(id="other", text="\n".join(f"row {i}" for i in range(500)), title="O"),
    ]
    for factory in ("IDMap2,Flat", "IVF16,Flat", "HNSW16", "IVF16,Flat,RFlat"):
        path = tmp_path / factory
        ingest(documents, path, splitter=splitter, embedder=embedder, factory=factory)
        with Index.open(path, embedder=embedder) as index:
            retriever = index.retriever("dense")
            hits = retriever.search("B\nline 7", k=10, where={"document_id": "big"})
            assert hits[0].chunk.text == "line 7"
            assert {hit.chunk.document_id for hit in hits} == {"big"}
            assert len(hits) == 10
            few = retriever.search("B\nline 7", k=10, where={"document_id": "other"})
            assert {hit.chunk.document_id for hit in few} == {"other"}


def test_modes_and_embedder(folder: Path, hash_embedder) -> None:
    with Index.open(folder) as index:
        assert index.retriever("bm25").search("gamma 3", k=1)[0].chunk.id == "d3#2"
        with pytest.raises(RetrievalError, match="with an embedder"):
            index.retriever("hybrid")
        with pytest.raises(RetrievalError, match="dense, bm25, hybrid"):
            index.retriever("sparse")


def test_title_is_matched(folder: Path) -> None:
    with Index.open(folder) as index:
        assert index.retriever("bm25").search("title", k=99)


def test_other_embedder_is_refused(folder: Path, make_hash_embedder, splitter) -> None:
    other = make_hash_embedder(fingerprint="b" * 32)
    for act in (
        lambda: Index.open(folder, embedder=other),
        lambda: ingest(DOCUMENTS, folder, splitter=splitter, embedder=other),
    ):
        with pytest.raises(EmbedderMismatchError, match="use that embedder") as caught:
            act()
        assert "\n" not in str(caught.value)


def all_files(folder: Path) -> list[Path]:
    generation = folder / Manifest.read(folder).generation
    return [folder / "manifest.json", *sorted(p for p in generation.rglob("*") if p.is_file())]


def test_every_corrupted_byte_is_noticed(folder: Path, tmp_path: Path) -> None:
    names = [path.relative_to(folder) for path in all_files(folder)]
    assert len(names) == 20
    for name in names:
        for damage in ("flip", "cut", "gone"):
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            path = copy / name
            content = bytearray(path.read_bytes())
            if damage == "flip":
                content[len(content) // 2] ^= 1
                path.write_bytes(content)
            elif damage == "cut":
                path.write_bytes(content[:-1])
            else:
                path.unlink()
            # Vectors are read by filters and ingests alone: their contents are checked on demand.
            lazily = damage == "flip" and path.name == "vectors.f32"
            expected = RetrievalError if name.name == "manifest.json" else CorruptIndexError
            act = Index.open(copy).verify if lazily else partial(Index.open, copy)
            with pytest.raises(expected) as caught:
                act()
            assert "\n" not in str(caught.value)
            shutil.rmtree(copy)


def test_corrupt_index_refuses_ingest(folder: Path, hash_embedder, splitter) -> None:
    path = folder / Manifest.read(folder).generation / "vectors.f32"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptIndexError, match=r"vectors\.f32"):
        ingest(DOCUMENTS, folder, splitter=splitter, embedder=hash_embedder)


def test_unchecked_open_still_sees_cut_files(folder: Path) -> None:
    for path in all_files(folder)[1:]:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(CorruptIndexError):
            Index.open(folder, verify=False)
        path.write_bytes(content)


def test_not_an_index(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="holds no index"):
        Index.open(tmp_path)
    with pytest.raises(RetrievalError, match="holds no index"):
        Index.open(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RetrievalError, match="is a file"):
        Index.open(tmp_path / "file")


def test_other_format_version(folder: Path) -> None:
    import hashlib

    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    del body["checksum"]
    body["format_version"] = 99
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(body))
    with pytest.raises(RetrievalError, match="format 99, this version reads 1"):
        Index.open(folder)


def test_no_pickle_on_disk(folder: Path) -> None:
    for path in all_files(folder):
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        assert path.suffix not in {".pkl", ".pickle", ".pt", ".bin"}


def test_open_index_survives_a_new_generation(folder: Path, hash_embedder, splitter) -> None:
    with Index.open(folder, embedder=hash_embedder) as index:
        ingest(DOCUMENTS[:1], folder, splitter=splitter, embedder=hash_embedder, sync=True)
        assert len(list(folder.glob("gen-*"))) == 1
        assert len(index) == 60
        for mode in ("dense", "bm25", "hybrid"):
            hits = index.retriever(mode).search("Title 9\nalpha 9", k=3, where={"year": 2009})
            assert hits[0].chunk.id == "d9#0"


@pytest.mark.parametrize("factory", ["IDMap2,Flat", "IVF4,Flat", "HNSW8", "IVF4,SQ8"])
def test_delete_for_factories(factory: str, tmp_path: Path, hash_embedder, splitter) -> None:
    path = tmp_path / "index"
    ingest(DOCUMENTS, path, splitter=splitter, embedder=hash_embedder, factory=factory)
    assert delete_documents(path, ["d1", "d3"]) == 6
    changed = Document(id="d5", text="wholly new", title="N", metadata={"year": 1, "even": True})
    report = ingest([changed], path, splitter=splitter, embedder=hash_embedder)
    assert report.factory == factory
    assert (report.documents_changed, report.chunks_total) == (1, 52)
    with Index.open(path, embedder=hash_embedder, search_options=None) as index:
        index.verify()
        assert index.retriever("dense").search("N\nwholly new", k=1)[0].chunk.document_id == "d5"
        found = {h.chunk.document_id for h in index.retriever("dense").search("x", k=52)}
        assert not found & {"d1", "d3"}
    with pytest.raises(RetrievalError, match="no document 'd1'"):
        delete_documents(path, ["d1"])


def test_everything_removed(folder: Path, hash_embedder) -> None:
    assert delete_documents(folder, [d.id for d in DOCUMENTS]) == 60
    with Index.open(folder, embedder=hash_embedder) as index:
        assert len(index) == 0
        for mode in ("dense", "bm25", "hybrid"):
            assert index.retriever(mode).search("x", k=3) == []
            assert index.retriever(mode).search("x", k=3, where={"year": 1}) == []
