"""The benchmark of long chats without its engine: the chats that it makes and reads, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag_eval.benchmarks.conversation import ConversationConfig
from rag_eval.benchmarks.conversation_chats import (
    SYSTEM,
    lay_out,
    make_talks,
    read_locomo,
    windows_of,
)
from rag_eval.errors import EvalError
from rag_pipeline import ModelTokenizer
from rag_pipeline.prompts.segments import SegmentEncoder


def words(text: str) -> list[int]:
    return [0] * len(text.split())


def test_a_locomo_file_is_read_as_exchanges_of_two_speakers(tmp_path: Path) -> None:
    lines = [("B", "zero"), ("A", "one"), ("A", "more"), ("B", "two"), ("A", "three")]
    told = [{"speaker": speaker, "text": text} for speaker, text in lines]
    talk = {
        "speaker_a": "A",
        "speaker_b": "B",
        "session_10": [{"speaker": "B", "text": "four"}],
        "session_2": told,
        "session_2_date_time": "noon",
    }
    file = tmp_path / "locomo.json"
    file.write_text(json.dumps([{"conversation": talk}]))
    assert read_locomo(file) == [[("one more", "two"), ("three", "four")]]
    file.write_text('{"a": 1}')
    with pytest.raises(EvalError, match="is no LoCoMo file"):
        read_locomo(file)


def test_windows_hold_what_fits_and_no_exchange_twice() -> None:
    talks = make_talks(2, 60, seed=3)
    assert talks != make_talks(2, 60, seed=4)
    chats = windows_of(talks, words, tokens=400, least=3, limit=4)
    assert [chat.id for chat in chats] == ["0-0", "1-0", "0-1", "1-1"]
    for chat in chats:
        size = sum(len(words(text)) for exchange in chat.exchanges for text in exchange)
        assert size + 10 * len(chat.exchanges) <= 400
        assert chat.following not in chat.exchanges
    assert not set(chats[0].exchanges) & set(chats[2].exchanges)
    assert chats[2].exchanges[0] == chats[0].following
    with pytest.raises(EvalError, match="lower --window"):
        windows_of(talks, words, tokens=10**6, least=3, limit=4)


def test_a_cut_chat_is_the_shared_part_and_the_end_of_the_whole_one(smollm2_path: Path) -> None:
    encoder = SegmentEncoder(ModelTokenizer.load(smollm2_path))
    exchanges = [("a b", "c d"), ("e f", "g h"), ("i j", "k l")]
    whole, prefix_len = lay_out(encoder, exchanges, "why")
    cut, same = lay_out(encoder, exchanges[2:], "why")
    assert prefix_len == same
    assert cut[:same] == whole[:same]
    assert cut[same:] == whole[-(len(cut) - same) :]
    assert SYSTEM in encoder.tokenizer.decode(whole[:same])


@pytest.mark.parametrize(
    ("given", "told"),
    [({"turns": 1}, "turns"), ({"window": 10}, "window"), ({"limit": 0}, "limit")],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, int], told: str) -> None:
    with pytest.raises(EvalError, match=told):
        ConversationConfig(**given)  # type: ignore[arg-type]
