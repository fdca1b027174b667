"""The writer of an index: what it refuses and clears, and random changes against a dictionary."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from index_parts import DOCUMENTS, make_chunk, settings_for

from retrievers import Index, IndexWriter, RetrievalError, SearchHit, ingest


def test_writer_refuses_duplicates_and_orphans(tmp_path: Path, hash_embedder) -> None:
    vectors = hash_embedder.encode_documents(["x", "y"])
    chunks = [make_chunk("d", 0, "x"), make_chunk("d", 0, "y")]
    with IndexWriter(tmp_path, settings_for(16)) as writer:
        with pytest.raises(RetrievalError, match="was not put before"):
            writer.append(chunks, vectors)
        writer.put_document("d", "h")
        with pytest.raises(RetrievalError, match="do not fit"):
            writer.append(chunks, vectors[:1])
        writer.append(chunks, vectors)
        with pytest.raises(RetrievalError, match="chunk id 'd#0' occurs twice"):
            writer.commit()
    assert not list(tmp_path.glob("gen-*"))
    with pytest.raises(RetrievalError, match="holds no index"):
        Index.open(tmp_path)


def test_two_writers_are_refused(folder: Path, hash_embedder, splitter) -> None:
    with IndexWriter(folder, settings_for(16)):
        with pytest.raises(RetrievalError, match="another process is changing") as caught:
            ingest(DOCUMENTS, folder, splitter=splitter, embedder=hash_embedder)
        assert "\n" not in str(caught.value)
        # Readers are not held up.
        with Index.open(folder) as index:
            assert len(index) == 60
    ingest(DOCUMENTS, folder, splitter=splitter, embedder=hash_embedder)


def test_leftovers_of_a_killed_commit_are_cleared(folder: Path, hash_embedder, splitter) -> None:
    (folder / "gen-000077").mkdir()
    (folder / "gen-000077" / "dense.faiss").write_bytes(b"half")
    (folder / "manifest.json.new").write_text("{")
    (folder / ".work" / "stage").mkdir(parents=True)
    report = ingest(DOCUMENTS, folder, splitter=splitter, embedder=hash_embedder)
    assert not report.changed
    assert [path.name for path in folder.glob("gen-*")] == ["gen-000001"]
    assert not (folder / "manifest.json.new").exists()


Place = tuple[str, str]
"""Document and text of a chunk."""


def places(hits: list[SearchHit]) -> list[Place]:
    return sorted((hit.chunk.document_id, hit.chunk.text) for hit in hits)


class StoreAgainstDict(RuleBasedStateMachine):
    """Random puts, removals and commits, compared with a dictionary after every commit."""

    factory = "IDMap2,Flat"
    embedder: object
    folder: Path

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.folder = Path(tempfile.mkdtemp(prefix="index-"))
        self.model: dict[str, list[str]] = {}
        self.opened = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule(
        puts=st.dictionaries(
            st.sampled_from("abcdef"),
            st.lists(st.text("xyz é\n\u2028😀", max_size=6), max_size=4),
            max_size=4,
        ),
        removals=st.sets(st.sampled_from("abcdef"), max_size=3),
        commit=st.booleans(),
    )
    def change(self, puts: dict[str, list[str]], removals: set[str], commit: bool) -> None:
        from dataclasses import replace

        model = dict(self.model)
        chosen = replace(settings_for(16), factory=self.factory)
        with IndexWriter(self.folder, chosen) as writer:
            for name in sorted(removals):
                assert writer.remove_document(name) == (name in model)
                model.pop(name, None)
            for name, texts in puts.items():
                writer.put_document(name, str(texts))
                chunks = [make_chunk(name, i, text) for i, text in enumerate(texts)]
                writer.append(chunks, self.embedder.encode_documents(texts))  # type: ignore[attr-defined]
                model.pop(name, None)
                model[name] = texts
            if commit:
                writer.commit()
        if commit:
            self.model = model
            self.opened = True

    @invariant()
    def agrees(self) -> None:
        if not getattr(self, "opened", False):
            return
        with Index.open(self.folder, embedder=self.embedder) as index:  # type: ignore[arg-type]
            found: dict[str, list[str]] = {record.id: [] for record in index.documents()}
            for chunk in index.chunks():
                assert chunk.id == f"{chunk.document_id}#{len(found[chunk.document_id])}"
                found[chunk.document_id].append(chunk.text)
            assert found == self.model
            expected = sorted((name, text) for name, texts in self.model.items() for text in texts)
            retriever = index.retriever("dense")
            everything = {"n": {"$gte": 0}} if expected else None  # a filter this small is exact
            assert places(retriever.search("query", k=100, where=everything)) == expected
            self.agrees_unfiltered(places(retriever.search("query", k=100)), expected)
            for name, texts in self.model.items():
                if texts:
                    where = {"document_id": name, "n": {"$lt": 2}}
                    hits = index.retriever("dense").search("query", k=100, where=where)
                    assert sorted(hit.chunk.text for hit in hits) == sorted(texts[:2])

    def agrees_unfiltered(self, found: list[Place], expected: list[Place]) -> None:
        """Every chunk once; a graph of many vertices may leave out a few.

        A vertex of HNSW8 has 16 links. Up to 17 vertices all are linked to all. Beyond, links are dropped,
        and now and then a few vertices (those of equal vectors above all) are linked to each other alone,
        where no search gets to them or away from them.
        """
        if "HNSW" in self.factory and len(expected) > 17:
            assert len(found) > len(expected) / 2
            assert not Counter(found) - Counter(expected)
        else:
            assert found == expected


@pytest.mark.parametrize("factory", ["IDMap2,Flat", "HNSW8"])
def test_store_against_dict(factory: str, make_hash_embedder) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Machine", (StoreAgainstDict,), {"factory": factory})
    machine.embedder = make_hash_embedder()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=8,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
