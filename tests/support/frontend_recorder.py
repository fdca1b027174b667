"""A backend of programs that keeps what SGLang's real interpreter sends, and answers with a fixed text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sglang.lang.backend.base_backend import BaseBackend

from rag_pipeline import ModelTokenizer
from rag_pipeline.frontend.backend import ChunkPrograms
from rag_pipeline.frontend.roles import chat_template_of


class Recorder(ChunkPrograms, BaseBackend):
    """Keeps what a program sends; answers with a fixed text."""

    def __init__(self, tokenizer: ModelTokenizer, folder: Path, **options: Any) -> None:
        BaseBackend.__init__(self)
        ChunkPrograms.__init__(self, tokenizer, **{"context_length": 8192, **options})
        self.chat_template = chat_template_of(tokenizer, str(folder))
        self.sent: list[dict[str, Any]] = []

    incremental = False

    def send(self, body: dict[str, Any]) -> Mapping[str, Any]:
        self.sent.append(body)
        ids = body["input_ids"]
        meta = {
            "prompt_tokens": len(ids),
            "completion_tokens": 1,
            "finish_reason": {"type": "stop"},
            # The last choice that was scored is the likeliest, whatever it is.
            "input_token_logprobs": [
                (-1.0 / len(self.sent), token, "")
                for token in ids[body.get("logprob_start_len", 0) :]
            ],
            "output_token_logprobs": [],
        }
        return {"text": "said", "meta_info": meta}

    def send_stream(self, body: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
        for text, reason in (("sa", None), ("said", {"type": "stop"})):
            report = self.send(body)["meta_info"] | {"finish_reason": reason}
            yield {"text": text, "meta_info": report}

    @property
    def generations(self) -> list[dict[str, Any]]:
        return [b for b in self.sent if b["sampling_params"]["max_new_tokens"] > 1]


def payload(body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = body["kv_hints"]["actions"][0]["payload"]
    return found


def chunk_texts(backend: Recorder, body: Mapping[str, Any]) -> list[str]:
    decode = backend.encoder.tokenizer.decode
    return [decode(body["input_ids"][a:b]) for a, b in payload(body).get("spans", [])]
