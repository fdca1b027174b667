"""Indexes as a server holds them: faults that pass, faults that are mended, what is told, one model."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from warm import WarmStart

from rag_pipeline.server.embedders import EmbedderPool, SharedEmbedder
from rag_pipeline.server.errors import ApiError, line_of, without_paths
from rag_pipeline.server.indexes import FAULT_S, ServedIndex
from retrievers import CorruptIndexError, Embedder, RetrievalError
from retrievers.manifest import MANIFEST_NAME


class Files:
    """An index whose manifest is there, and whose files open when they are told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.error: Exception | None = OSError(errno.EMFILE, "Too many open files", "/srv/acme/x")
        self.opened = 0
        self.now = 100.0
        (folder / MANIFEST_NAME).write_text("{}")
        monkeypatch.setattr("rag_pipeline.server.indexes.Index.open", self._open)
        monkeypatch.setattr(ServedIndex, "embedder", lambda index: None)
        monkeypatch.setattr(ServedIndex, "manifest", lambda index: None)
        self.index = ServedIndex("main", folder, EmbedderPool("x"), clock=lambda: self.now)

    def _open(self, folder: Path, **options: Any) -> Any:
        self.opened += 1
        if self.error is not None:
            raise self.error
        return "the index"

    def mend(self) -> None:
        self.error = None
        os.utime(self.folder / MANIFEST_NAME, ns=(1, 1))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    return Files(tmp_path, monkeypatch)


def test_a_passing_fault_is_not_believed_for_ever(files: Files) -> None:
    for _ in range(3):
        with pytest.raises(ApiError) as refusal:
            files.index.current()
        assert refusal.value.status == 503
    assert files.opened == 1  # a damaged index is not read whole for every request
    files.error = None
    files.now += FAULT_S
    assert files.index.current() == "the index"  # type: ignore[comparison-overlap]
    assert files.index.status()["ok"]


def test_health_finds_that_a_fault_has_passed_without_a_search(files: Files) -> None:
    with pytest.raises(ApiError):
        files.index.current()
    files.error = None
    files.now += FAULT_S
    assert not files.index.status()["ok"]
    looking = files.index._looking
    assert looking is not None
    looking.join(60)
    assert files.index.status()["ok"]


def test_health_is_good_as_soon_as_an_index_is_mended(files: Files) -> None:
    files.error = CorruptIndexError("/srv/acme/x is damaged")
    with pytest.raises(ApiError):
        files.index.current()
    assert not files.index.status()["ok"]
    files.mend()
    assert files.index.status()["ok"]


# -- what is told -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files", "/srv/acme/x"),
        CorruptIndexError("/srv/acme/x is damaged"),
        RetrievalError("/srv/acme is a file, not an index folder"),
        RetrievalError("cannot load the embedder '/srv/acme/': no such file"),
        ZeroDivisionError("/srv/acme"),
    ],
)
def test_no_path_of_the_server_is_told_in_health(files: Files, error: Exception) -> None:
    files.error = error
    assert "/srv" not in line_of(error)
    if isinstance(error, OSError | RetrievalError):
        with pytest.raises(ApiError):
            files.index.current()
        assert "/srv" not in str(files.index.status())
        assert files.index.fault == str(error)


def test_only_paths_are_taken_out_of_a_line() -> None:
    for line in ("uploads/a.txt: 3/4 of it", "http://host/a/b", "a / b", "1/2", "and/or", "/v1"):
        assert without_paths(line) == line
    assert without_paths("no tokenizer in /srv/m/x.gguf: give '/a/b/'") == (
        "no tokenizer in x.gguf: give 'b'"
    )


# -- one model ----------------------------------------------------------------------------------


def test_a_model_is_loaded_once_however_many_threads_ask_for_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    others = threading.Event()

    class Model:
        preprocess = None

        def get_embedding_dimension(self) -> int:
            return 7

    def load(embedder: Embedder) -> Model:
        loads.append(1)
        others.wait(0.5)  # the others get as far as they get
        return Model()

    monkeypatch.setattr(Embedder, "_load", load)
    embedder = SharedEmbedder(tmp_path, name="x")
    threads = [threading.Thread(target=lambda: embedder.dim) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(loads) == 1


def test_queries_that_wait_share_a_pass_and_each_gets_its_own(
    minilm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [f"Who paints door {number}?" for number in range(12)]
    alone = [Embedder(minilm_path).encode_query(question) for question in questions]
    passes: list[list[str]] = []
    original, entered, gate = Embedder.encode_queries, threading.Event(), threading.Event()

    def noted(embedder: Embedder, texts: list[str]) -> Any:
        passes.append(list(texts))
        entered.set()
        assert gate.wait(60)
        if "cannot be read" in texts:
            raise ValueError("this text")
        return original(embedder, texts)

    monkeypatch.setattr(Embedder, "encode_queries", noted)
    shared = SharedEmbedder(minilm_path, name="all-minilm-l6-v2")
    with ThreadPoolExecutor(len(questions) + 1) as pool:
        found = [pool.submit(shared.encode_query, questions[0])]
        assert entered.wait(60)
        found += [pool.submit(shared.encode_query, question) for question in questions[1:]]
        bad = pool.submit(shared.encode_query, "cannot be read")
        deadline = time.monotonic() + 60
        while len(shared._queries) < len(questions) and time.monotonic() < deadline:
            time.sleep(0.01)
        gate.set()
        for mine, one in zip(found, alone, strict=True):
            assert abs(mine.result(60) - one).max() < 1e-5
        with pytest.raises(ValueError, match="this text"):
            bad.result(60)
    assert passes[0] == questions[:1]
    assert sorted(passes[1]) == sorted([*questions[1:], "cannot be read"])
    # One of them failed, and then each was tried alone.
    assert sorted(map(len, passes[2:])) == [1] * len(questions)


def test_a_query_does_not_wait_for_passages_and_passages_give_way(
    minilm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate, nice = threading.Event(), threading.Event(), []
    original = Embedder.encode_documents

    def held(embedder: Embedder, batch: list[str], **options: Any) -> Any:
        nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        entered.set()
        assert gate.wait(60)
        return original(embedder, batch, **options)

    monkeypatch.setattr(Embedder, "encode_documents", held)
    shared = SharedEmbedder(minilm_path, name="all-minilm-l6-v2")
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with ThreadPoolExecutor(1) as pool:
        passages = pool.submit(shared.encode_documents, ["The keeper paints the purple door."])
        assert entered.wait(60)
        assert shared.encode_query("Who paints?").shape == (384,)
        assert not passages.done()
        gate.set()
        assert passages.result(60).shape == (1, 384)
    assert nice == [min(19, mine + 10)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine


def test_an_ingest_that_waits_for_its_turn_can_be_stopped(
    minilm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate = threading.Event(), threading.Event()
    original = Embedder.encode_documents

    def held(embedder: Embedder, batch: list[str], **options: Any) -> Any:
        entered.set()
        assert gate.wait(60)
        return original(embedder, batch, **options)

    class Stopped(Exception):
        pass

    def stop(texts: int) -> None:
        assert texts == 0  # none of its own were embedded
        raise Stopped

    monkeypatch.setattr(Embedder, "encode_documents", held)
    shared = SharedEmbedder(minilm_path, name="all-minilm-l6-v2")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(shared.encode_documents, ["The keeper paints the purple door."])
        assert entered.wait(60)
        with pytest.raises(Stopped):
            shared.encode_documents(["Another text."], progress=stop)
        assert not first.done()
        gate.set()
        assert first.result(60).shape == (1, 384)
        # It left no turn behind that nobody takes.
        assert shared.encode_documents(["A third text."]).shape == (1, 384)


def test_the_tokenizer_of_a_shared_model_has_one_caller_at_a_time(
    minilm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, plain = "The keeper paints the purple door. " * 20, Embedder(minilm_path)
    passage, query = plain.encode_documents([text]), plain.encode_queries(["Who?"])
    shared = SharedEmbedder(minilm_path, name="all-minilm-l6-v2")
    kind = type(shared._loaded().tokenizer)
    original, inside, most, calls = kind.__call__, [0], [0], [0]

    def counted(*args: Any, **options: Any) -> Any:
        inside[0] += 1
        calls[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        try:
            return original(*args, **options)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(kind, "__call__", counted)
    with ThreadPoolExecutor(6) as pool:
        passages = [pool.submit(shared.encode_documents, [text] * 9) for _ in range(2)]
        queries = [pool.submit(shared.encode_queries, ["Who?"]) for _ in range(2)]
        counts = [pool.submit(shared.count_tokens, [text] * 40) for _ in range(2)]
        assert [count.result(60) for count in counts] == [[142] * 40] * 2
        for one in passages:
            assert abs(one.result(60) - passage).max() < 1e-5
        for one in queries:
            assert abs(one.result(60) - query).max() < 1e-5
    assert calls[0] >= 8
    assert most == [1]


def test_a_long_query_does_not_make_the_others_as_wide(
    minilm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[str]] = []
    original = Embedder.encode_queries

    def noted(embedder: Embedder, texts: list[str]) -> Any:
        passes.append(list(texts))
        return original(embedder, texts)

    shared = SharedEmbedder(minilm_path, name="all-minilm-l6-v2")
    monkeypatch.setattr(Embedder, "encode_queries", noted)
    short, long = [f"Who paints door {number}?" for number in range(5)], "word " * 1000
    with ThreadPoolExecutor(6) as pool, shared._asking.turn():
        found = []
        for text in [*short[:2], long, *short[2:]]:
            found.append(pool.submit(shared.encode_query, text))
            deadline = time.monotonic() + 60
            while len(shared._queries) < len(found) and time.monotonic() < deadline:
                time.sleep(0.01)
    assert all(one.result(60).shape == (384,) for one in found)
    assert passes == [short[:2], [long], short[2:]]


def test_passages_still_come_while_the_interpreter_ends(
    minilm_path: Path, warm_start: WarmStart
) -> None:
    # An executor's threads take no more work by then, and the upload would have failed.
    program = f"""
import threading, time
from rag_pipeline.server.embedders import SharedEmbedder
shared = SharedEmbedder({str(minilm_path)!r}, name="x")
begun = threading.Event()
def told(number):
    begun.set()
    time.sleep(0.3)  # the interpreter is ending meanwhile
def ingest():
    shared.encode_documents(["word " * 900] * 3, progress=told)
    print("came to its end", flush=True)
threading.Thread(target=ingest).start()
begun.wait(120)
"""
    done = warm_start.run([sys.executable, "-c", program], environment=os.environ)
    assert (done.returncode, done.stdout) == (0, "came to its end\n"), done.stderr


def test_an_ingest_has_short_turns_of_the_embedder(
    minilm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"word {number} " * times for number in range(6) for times in (1, 20, 90, 900)]
    plain = Embedder(minilm_path).encode_documents(texts)
    turns: list[list[str]] = []
    original = Embedder.encode_documents

    def noted(embedder: Embedder, batch: list[str], **options: Any) -> Any:
        turns.append(list(batch))
        return original(embedder, batch, **options)

    monkeypatch.setattr(Embedder, "encode_documents", noted)
    shared = SharedEmbedder(minilm_path, name="all-minilm-l6-v2").encode_documents(texts)
    assert abs(shared - plain).max() < 1e-5
    assert sorted(text for turn in turns for text in turn) == sorted(texts)
    assert all(len(turn) == 1 or len(turn) * max(map(len, turn)) <= 4096 for turn in turns)
    assert max(map(len, turns)) > 2  # short ones share a turn
