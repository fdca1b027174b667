"""The sample of a corpus that chunk KV is computed behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from rag_pipeline import EngineError
from rag_pipeline.prompts.passage_sample import LEAST_TEXTS, index_passage, sample_passage
from rag_pipeline.sglang_plugin.fusion.runtime.passage import passage_ids, read_passage
from retrievers import Chunk


def texts(count: int, sentences: int = 9) -> list[str]:
    return [
        " ".join(f"Text {text} says that matter {line} is settled." for line in range(sentences))
        for text in range(count)
    ]


class Opened:
    """What :func:`index_passage` takes of an index."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self._texts = texts(count)

    def chunks(self):
        for row, text in enumerate(self._texts):
            yield Chunk(
                id=str(row),
                text=text,
                document_id="d",
                title="",
                start=0,
                end=len(text),
                num_tokens=9,
            )


def test_whole_sentences_from_all_over_the_corpus() -> None:
    passage = sample_passage(texts(500))
    pieces = passage.split("\n\n")
    assert 4000 < len(passage) < 12000
    assert all(piece.startswith("Text ") and piece.endswith("settled.") for piece in pieces)
    numbers = [int(piece.split()[1]) for piece in pieces]
    assert numbers == sorted(numbers)
    assert numbers[0] < 50
    assert numbers[-1] > 450
    assert sample_passage(texts(500)) == passage


def test_short_texts_give_more_pieces() -> None:
    few, many = sample_passage(texts(500)), sample_passage(texts(500, sentences=2))
    assert many.count("\n\n") > few.count("\n\n")


def test_a_small_corpus_gives_none() -> None:
    assert sample_passage(texts(LEAST_TEXTS - 1)) == ""
    assert sample_passage(["", " "] * LEAST_TEXTS) == ""


def test_an_index_keeps_its_first_sample(tmp_path: Path) -> None:
    assert index_passage(Opened(tmp_path, 3)) is None
    assert list(tmp_path.iterdir()) == []
    file = index_passage(Opened(tmp_path, 100))
    assert file is not None
    first = file.read_text("utf-8")
    assert first == sample_passage(texts(100))
    assert index_passage(Opened(tmp_path, 300)) == file
    assert file.read_text("utf-8") == first
    assert list(tmp_path.iterdir()) == [file]
    assert index_passage(Opened(tmp_path / "gone", 100)) is None


def test_a_passage_file_is_read_or_refused_in_one_line(tmp_path: Path, smollm2_path: Path) -> None:
    from transformers import AutoTokenizer

    file = tmp_path / "p.txt"
    file.write_text("Bees <|im_end|> dance.", "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    ids = passage_ids(tokenizer, 768, 1 << 15, text=read_passage(str(file)))
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "Bees <|im_end|> dance.\n\n"
    assert read_passage("").startswith("[Rivers")
    for content in (b"\xff\xfe\x00", b" \n"):
        file.write_bytes(content)
        with pytest.raises(EngineError, match=r"passage_file .*p\.txt") as caught:
            read_passage(str(file))
        assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match="cannot be read"):
        read_passage(str(tmp_path / "none.txt"))
