from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retrievers import (
    Document,
    Embedder,
    Index,
    IngestProgress,
    Manifest,
    RetrievalError,
    ingest,
)
from retrievers.chunk_texts import ChunkTexts
from retrievers.journal import EmbeddingJournal, text_key


def corpus(count: int) -> list[Document]:
    return [
        Document(id=f"d{i}", text=f"first of {i}\nsecond of {i}", title=f"T{i}")
        for i in range(count)
    ]


def test_unchanged_files_embed_nothing(tmp_path: Path, hash_embedder, splitter) -> None:
    first = ingest(corpus(30), tmp_path, splitter=splitter, embedder=hash_embedder)
    assert (first.documents_added, first.chunks_embedded, first.changed) == (30, 60, True)
    hash_embedder.texts.clear()
    again = ingest(corpus(30), tmp_path, splitter=splitter, embedder=hash_embedder)
    assert hash_embedder.texts == []
    assert (again.documents_unchanged, again.chunks_embedded, again.changed) == (30, 0, False)
    assert Manifest.read(tmp_path).generation == "gen-000001"


def test_changed_document_embeds_only_its_new_chunks(
    tmp_path: Path, hash_embedder, splitter
) -> None:
    documents = corpus(10)
    ingest(documents, tmp_path, splitter=splitter, embedder=hash_embedder)
    hash_embedder.texts.clear()
    documents[4] = replace(documents[4], text="first of 4\nedited")
    report = ingest(documents, tmp_path, splitter=splitter, embedder=hash_embedder)
    assert hash_embedder.texts == ["T4\nedited"]
    assert (report.documents_changed, report.chunks_reused, report.chunks_total) == (1, 1, 20)
    with Index.open(tmp_path, embedder=hash_embedder) as index:
        assert sorted(c.text for c in index.chunks() if c.document_id == "d4") == [
            "edited",
            "first of 4",
        ]


def test_removal_only_when_asked(tmp_path: Path, hash_embedder, splitter) -> None:
    ingest(corpus(10), tmp_path, splitter=splitter, embedder=hash_embedder)
    kept = ingest(corpus(3), tmp_path, splitter=splitter, embedder=hash_embedder)
    assert (kept.documents_removed, kept.chunks_total) == (0, 20)
    synced = ingest(corpus(3), tmp_path, splitter=splitter, embedder=hash_embedder, sync=True)
    assert (synced.documents_removed, synced.chunks_total) == (7, 6)


def test_equal_texts_are_embedded_once(tmp_path: Path, hash_embedder, splitter) -> None:
    documents = [Document(id=f"d{i}", text="same line", title="same") for i in range(50)]
    report = ingest(documents, tmp_path, splitter=splitter, embedder=hash_embedder)
    assert len(hash_embedder.texts) == report.chunks_embedded == 1
    assert (report.chunks_reused, report.chunks_total) == (49, 50)


def test_windows_equal_one_window(
    tmp_path: Path, hash_embedder, splitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [
        Document(
            id=f"d{i}", text="\n".join(f"{'x' * (j % 7)} {i} {j}" for j in range(13)), title=""
        )
        for i in range(20)
    ]
    ingest(documents, tmp_path / "a", splitter=splitter, embedder=hash_embedder)
    monkeypatch.setattr("retrievers.ingestion.WINDOW_CHUNKS", 17)
    monkeypatch.setattr("retrievers.embedding_reuse.SHARD_CHUNKS", 5)
    ingest(documents, tmp_path / "b", splitter=splitter, embedder=hash_embedder)
    first, second = Manifest.read(tmp_path / "a"), Manifest.read(tmp_path / "b")
    assert first.files == second.files


def test_new_splitter_settings_split_anew(tmp_path: Path, hash_embedder, make_splitter) -> None:
    ingest(corpus(5), tmp_path, splitter=make_splitter(n=1), embedder=hash_embedder)
    report = ingest(corpus(5), tmp_path, splitter=make_splitter(n=2), embedder=hash_embedder)
    # Same lines, so split again but nothing embedded again.
    assert (report.documents_changed, report.chunks_embedded) == (5, 0)
    assert Manifest.read(tmp_path).splitter["n"] == 2
    with pytest.raises(RetrievalError, match="split with other settings"):
        ingest(corpus(2), tmp_path, splitter=make_splitter(n=3), embedder=hash_embedder)


def test_factory_change_rebuilds_without_embedding(tmp_path: Path, hash_embedder, splitter) -> None:
    ingest(corpus(50), tmp_path, splitter=splitter, embedder=hash_embedder)
    report = ingest(
        corpus(50),
        tmp_path,
        splitter=splitter,
        embedder=hash_embedder,
        factory="IVF4,Flat",
        search_options="nprobe=4",
    )
    assert (report.chunks_embedded, report.factory, report.changed) == (0, "IVF4,Flat", True)
    kept = ingest(corpus(51), tmp_path, splitter=splitter, embedder=hash_embedder)
    assert kept.factory == "IVF4,Flat"
    manifest = Manifest.read(tmp_path)
    assert (manifest.search_options, manifest.num_trained) == ("nprobe=4", 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "Bogus"}, "'Bogus' cannot be built"),
        ({"factory": "IVF4,Flat", "search_options": "efSearch=3"}, "do not fit this index"),
        ({"factory": "IVF999,Flat"}, "at least 999 vectors"),
    ],
)
def test_bad_settings_leave_no_index(
    options: dict[str, str], message: str, tmp_path: Path, hash_embedder, splitter
) -> None:
    with pytest.raises(RetrievalError, match=message):
        ingest(corpus(5), tmp_path, splitter=splitter, embedder=hash_embedder, **options)
    with pytest.raises(RetrievalError, match="holds no index"):
        Index.open(tmp_path)


def test_bad_documents(tmp_path: Path, hash_embedder, splitter) -> None:
    with pytest.raises(RetrievalError, match="nothing to ingest"):
        ingest([], tmp_path / "a", splitter=splitter, embedder=hash_embedder)
    with pytest.raises(RetrievalError, match="'d0' occurs twice"):
        ingest(corpus(1) * 2, tmp_path / "b", splitter=splitter, embedder=hash_embedder)
    (tmp_path / "file").write_text("")
    with pytest.raises(RetrievalError, match="is a file"):
        ingest(corpus(1), tmp_path / "file", splitter=splitter, embedder=hash_embedder)


@pytest.mark.parametrize("name", ["title", "path", "document_id", "$schema", "$or"])
def test_metadata_called_like_a_field_is_kept_and_found(
    name: str, tmp_path: Path, hash_embedder, splitter
) -> None:
    document = replace(corpus(1)[0], metadata={name: "Menu"})
    ingest([document], tmp_path, splitter=splitter, embedder=hash_embedder)
    with Index.open(tmp_path, embedder=hash_embedder) as index:
        found = index.search_terms("first", k=3, where={f"metadata.{name}": "Menu"})
        assert [hit.chunk.metadata for hit in found] == [{name: "Menu"}]
        assert index.search_terms("first", k=3, where={"title": "T0"})


def test_no_character_or_value_of_a_document_stops_an_ingest(
    tmp_path: Path, hash_embedder, splitter
) -> None:
    odd = Document(
        id="\udce9",
        text="word \ud800\nnext",
        title="\udfff",
        path="\udce9",
        metadata={
            "bad \udce9": "\ud800", "nan": float("nan"), "inf": float("inf"), "none": None,
            "huge": 10**5000, "long": 2**64, "list": [1, "\ud800"], "path type": Path("a"), "": 1,
        },  # type: ignore[dict-item]
    )  # fmt: skip
    ingest([odd, *corpus(2)], tmp_path, splitter=splitter, embedder=hash_embedder)
    with Index.open(tmp_path, embedder=hash_embedder) as index:
        (first, _) = [chunk for chunk in index.chunks() if chunk.title == "\ufffd"]
        assert first.text == "word \ufffd"
        assert set(first.metadata) == {
            "bad \ufffd", "inf", "huge", "long", "list", "path type", "",
        }  # fmt: skip
        assert first.metadata["long"] == "18446744073709551616"
        assert index.search_terms("first", k=5)


def test_an_index_with_terms_of_other_rules_is_searched_right_and_mended_by_an_ingest(
    tmp_path: Path, hash_embedder, splitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [replace(corpus(1)[0], text="Prüfbericht und Größe")]
    with monkeypatch.context() as older:
        older.setattr("retrievers.bm25_builder.ANALYSIS", 1)
        older.setattr("retrievers.bm25_builder.text_terms", lambda text: text.split())
        ingest(documents, tmp_path, splitter=splitter, embedder=hash_embedder)
    with Index.open(tmp_path) as index:
        assert len(index.search_terms("prufbericht", k=3)) == 1
    hash_embedder.texts.clear()
    report = ingest(documents, tmp_path, splitter=splitter, embedder=hash_embedder)
    assert (report.changed, hash_embedder.texts) == (True, [])
    again = ingest(documents, tmp_path, splitter=splitter, embedder=hash_embedder)
    assert not again.changed
    with Index.open(tmp_path) as index:
        assert len(index.search_terms("prufbericht", k=3)) == 1


def test_columns_of_other_rules_are_made_anew_by_an_ingest(
    tmp_path: Path, hash_embedder, splitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [replace(corpus(1)[0], metadata={"kind": "report"})]
    with monkeypatch.context() as older:
        older.setattr("retrievers.columns._RULES", 0)
        fields = "retrievers.generation_writer.chunk_fields"
        older.setattr(fields, lambda chunk: {"document_id": chunk.document_id, "title": "old"})
        ingest(documents, tmp_path, splitter=splitter, embedder=hash_embedder)
    for expected in (True, False):
        report = ingest(documents, tmp_path, splitter=splitter, embedder=hash_embedder)
        assert report.changed == expected
    with Index.open(tmp_path) as index:
        assert index.search_terms("first", k=3, where={"kind": "report"})


def test_one_more_document_looks_at_no_chunk_that_is_there(
    tmp_path: Path, hash_embedder, splitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python that goes through a large index holds up the searches of its process for seconds."""
    ingest(corpus(40), tmp_path, splitter=splitter, embedder=hash_embedder)
    looked: list[int] = []
    chunk = ChunkTexts.chunk

    def look(store: ChunkTexts, row: int):
        looked.append(row)
        return chunk(store, row)

    monkeypatch.setattr(ChunkTexts, "chunk", look)
    more = replace(corpus(1)[0], id="more", text="one line")
    ingest([more], tmp_path, splitter=splitter, embedder=hash_embedder)
    assert looked == [0]  # its own, among the new ones
    monkeypatch.undo()
    with Index.open(tmp_path, embedder=hash_embedder) as index:
        assert len(list(index.documents())) == 41
        ids = [chunk.id for chunk in index.chunks()]
        assert len(set(ids)) == len(ids)
        assert [index.chunk(name).id for name in ids] == ids


def test_values_that_are_not_finite_are_refused(tmp_path: Path, hash_embedder, splitter) -> None:
    hash_embedder.encode_documents = lambda texts, **_: np.full(
        (len(texts), 16), np.nan, np.float32
    )
    with pytest.raises(RetrievalError, match="not finite"):
        ingest(corpus(1), tmp_path, splitter=splitter, embedder=hash_embedder)


def test_failing_source_resumes(tmp_path: Path, hash_embedder, splitter, monkeypatch) -> None:
    monkeypatch.setattr("retrievers.ingestion.WINDOW_CHUNKS", 10)

    def failing() -> Iterator[Document]:
        yield from corpus(12)
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        ingest(failing(), tmp_path, splitter=splitter, embedder=hash_embedder)
    assert len(hash_embedder.texts) == 20
    report = ingest(corpus(12), tmp_path, splitter=splitter, embedder=hash_embedder)
    assert (report.chunks_resumed, report.chunks_embedded) == (20, 4)
    assert len(hash_embedder.texts) == 24


def test_progress(tmp_path: Path, hash_embedder, splitter) -> None:
    seen: list[IngestProgress] = []
    ingest(corpus(9), tmp_path, splitter=splitter, embedder=hash_embedder, progress=seen.append)
    assert seen[-1] == IngestProgress(
        stage="write", documents=9, chunks=18, embedded=18, reused=0, written=18, total=18
    )
    assert [state.documents for state in seen] == sorted(state.documents for state in seen)


def test_empty_document_is_remembered(tmp_path: Path, hash_embedder, splitter) -> None:
    documents = [*corpus(2), Document(id="empty", text="", title="e")]
    ingest(documents, tmp_path, splitter=splitter, embedder=hash_embedder)
    again = ingest(documents, tmp_path, splitter=splitter, embedder=hash_embedder)
    assert again.documents_unchanged == 3


def test_journal_discards_what_is_not_whole(tmp_path: Path, caplog) -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    keys = [text_key(name) for name in "abc"]
    journal = EmbeddingJournal(tmp_path, "f", 4)
    journal.append(keys[:2], vectors[:2])
    journal.append(keys[2:], vectors[2:])
    np.testing.assert_array_equal(journal.vectors([keys[2], keys[0]]), vectors[[2, 0]])
    again = EmbeddingJournal(tmp_path, "f", 4)
    assert len(again) == 3
    first, _ = sorted((tmp_path / "f").glob("*.npy"))
    first.write_bytes(first.read_bytes()[:-1])
    (tmp_path / "f" / "new.part").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        torn = EmbeddingJournal(tmp_path, "f", 4)
    assert "cut off" in caplog.text
    assert keys[0] not in torn
    np.testing.assert_array_equal(torn.vectors([keys[2]]), vectors[2:])
    torn.append(keys[:1], vectors[:1])
    assert len(EmbeddingJournal(tmp_path, "f", 4)) == 2
    assert len(EmbeddingJournal(tmp_path, "other", 4)) == 0


def test_real_embedder_finds_meaning(tmp_path: Path, real_embedder: Embedder, splitter) -> None:
    texts = [
        "The cat sleeps on the warm sofa.",
        "Interest rates rose by half a percent.",
        "A parser turns characters into a syntax tree.",
    ]
    documents = [Document(id=str(i), text=text, title="") for i, text in enumerate(texts)]
    report = ingest(documents, tmp_path, splitter=splitter, embedder=real_embedder)
    assert report.chunks_truncated == 0
    with Index.open(tmp_path, embedder=real_embedder) as index:
        retriever = index.retriever("dense")
        assert retriever.search("a feline resting", k=1)[0].chunk.document_id == "0"
        assert retriever.search("monetary policy", k=1)[0].chunk.document_id == "1"
        assert retriever.search("compiler front end", k=1)[0].chunk.document_id == "2"


def test_real_embedder_says_what_it_cannot_read(
    tmp_path: Path, real_embedder: Embedder, splitter, caplog
) -> None:
    documents = [Document(id="long", text="word " * 400, title=""), *corpus(1)]
    with caplog.at_level(logging.WARNING):
        report = ingest(documents, tmp_path, splitter=splitter, embedder=real_embedder)
    assert report.chunks_truncated == 1
    assert "1 of 3 chunks are longer" in caplog.text


def test_outgrown_index_is_trained_anew(tmp_path: Path, hash_embedder, splitter) -> None:
    options = {"splitter": splitter, "embedder": hash_embedder, "factory": "IVF4,Flat"}
    ingest(corpus(10), tmp_path, **options)
    ingest(corpus(30), tmp_path, **options)
    assert Manifest.read(tmp_path).num_trained == 20
    hash_embedder.texts.clear()
    ingest(corpus(60), tmp_path, **options)
    assert Manifest.read(tmp_path).num_trained == 120
    assert len(hash_embedder.texts) == 60
    with Index.open(tmp_path, embedder=hash_embedder, search_options="nprobe=4") as index:
        for number in (0, 25, 59):
            hits = index.retriever("dense").search(f"T{number}\nfirst of {number}", k=1)
            assert hits[0].chunk.id == f"d{number}#0"
