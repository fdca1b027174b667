"""What both backends of programs share: the state as token ids with chunk spans, in each request."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

from sglang.lang.global_config import global_config

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.frontend.marked_text import segments_of
from rag_pipeline.frontend.turns import TRUNCATED_KEY, turn_starts, without_turns
from rag_pipeline.prompts.segments import Segment, SegmentEncoder
from rag_pipeline.prompts.tokenizer import ModelTokenizer
from rag_pipeline.prompts.truncation import (
    Truncation,
    check_truncation,
    estimated_tokens,
    first_that_fits,
    truncated,
)
from rag_pipeline.protocol import (
    FusionChoice,
    FusionFields,
    StreamReader,
    build_requests,
)
from rag_pipeline.types import NOTHING_CUT, Span, Truncated

DEFAULT_POLICY = "query"

_LOGPROB_FIELDS = (
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_text_in_logprobs",
)


class ProgramOptions(FusionFields, total=False):
    """Keyword arguments of the backends; :class:`ChunkPrograms` tells what they mean."""

    build_missing: bool
    keep_turns: bool
    truncation: Truncation


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Prompt:
    """A program's text as it is sent."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    cut: Truncated = NOTHING_CUT

    def note_cut(self, meta_info: Mapping[str, Any]) -> Mapping[str, Any]:
        """Tell beside what the engine reports which turns were cut."""
        return {**meta_info, TRUNCATED_KEY: self.cut} if self.cut.turns else meta_info


class ChunkPrograms(ABC):
    """Executes SGLang programs whose text carries chunks; mixed into a backend.

    A program's text becomes token ids here: chunks alone, all else between two of them in one go.
    Special tokens are control tokens only where the chat template or :func:`.control` wrote them.

    Parameters
    ----------
    tokenizer : ModelTokenizer
        The model's tokenizer.
    context_length : int
        Most tokens of prompt and answer together.
    policy, ratio, attention : str, float or None, str
        See :class:`~rag_pipeline.protocol.FusionChoice`; policy ``query`` by default.
    build_missing : bool
        Compute a chunk that this backend has not seen behind this prefix before the first request
        that holds it, so that already this request reuses it. Otherwise the engine does so later,
        when it is idle. It pays when chunks occur more than once.
    keep_turns : bool
        Keep what a program's ``gen`` computed over fused chunks for the next ``gen`` of the same
        program, which then computes only what came behind it. It takes room in the chunk cache.
    truncation : str
        ``auto`` sends a chat that does not fit the context without its oldest turns
        (:mod:`rag_pipeline.prompts.truncation`); the program's own text stays whole. What stands in front of the first
        turn and the last turn stay. ``disabled`` sends all, which the engine refuses.

    Raises
    ------
    RagPipelineError
        An unknown policy, a ratio that it does not take, or an unknown truncation.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        context_length: int,
        build_missing: bool = False,
        keep_turns: bool = False,
        truncation: Truncation = "auto",
        **fusion: Unpack[FusionFields],
    ) -> None:
        given: FusionFields = {"policy": DEFAULT_POLICY, **fusion}
        self.fusion = FusionChoice(**given)
        self.fusion.check()
        check_truncation(truncation)
        self.truncation = truncation
        self.context_length = context_length
        self.encoder = SegmentEncoder(tokenizer)
        self.build_missing = build_missing and not self.fusion.is_exact
        self.keep_turns = keep_turns
        self._bos = tokenizer.bos_token or ""
        self._built: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        self._build_lock = threading.Lock()

    @abstractmethod
    def send(self, body: dict[str, Any]) -> Mapping[str, Any]:
        """Send one request in the form of ``/generate`` and return the answer."""

    @abstractmethod
    def send_stream(self, body: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Send one request and yield the messages of its stream."""

    @property
    @abstractmethod
    def incremental(self) -> bool:
        """Whether a stream's messages carry only what is new."""

    def encode(self, text: str) -> tuple[tuple[int, ...], tuple[Span, ...]]:
        """Token ids and chunk spans of a program's text."""
        segments = segments_of(text)
        if self._bos and not (segments and segments[0].text.startswith(self._bos)):
            segments.insert(0, Segment(text=self._bos, kind="template"))
        return self.encoder.encode(segments)

    # -- what the interpreter calls -----------------------------------------------------------

    def generate(self, s: Any, sampling_params: Any) -> tuple[Any, Mapping[str, Any]]:
        """Continue the program's text; the interpreter's ``sgl.gen``."""
        prompt = self._prompt_of(s, sampling_params)
        answer = self.send(self._request(s, prompt, sampling_params))
        if isinstance(answer, list):  # n > 1
            return [one["text"] for one in answer], prompt.note_cut(answer[0]["meta_info"])
        piece = StreamReader(incremental=True).read(answer)
        return piece.text, prompt.note_cut(piece.meta_info)

    def generate_stream(
        self, s: Any, sampling_params: Any
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Continue the program's text piece by piece."""
        reader = StreamReader(incremental=self.incremental)
        prompt = self._prompt_of(s, sampling_params)
        body = {**self._request(s, prompt, sampling_params), "stream": True}
        for message in self.send_stream(body):
            piece = reader.read(message)
            yield piece.text, prompt.note_cut(piece.meta_info)

    def select(
        self, s: Any, choices: Sequence[str], temperature: float, choices_method: Any
    ) -> Any:
        """Choose by log-probability; the interpreter's ``sgl.select``.

        The choices' tokens follow the text's own, so nothing has to be mended at the border. The
        prompt is prefilled exactly: the engine gives no log-probabilities of fused prompts.
        """
        if temperature > 1e-5:
            raise RagPipelineError(f"sgl.select has temperature {temperature}; it must be 0")
        behind = [self.encoder.tokenizer.encode(choice) for choice in choices]
        before = self.lay_out(s.text_, room=max(map(len, behind), default=0)).ids
        scored = [self._score(before, choice) for choice in behind]
        unconditional = None
        if choices_method.requires_unconditional_logprobs:
            unconditional = [self._logprobs([entry[1] for entry in one[0]], 0)[0] for one in scored]
        return choices_method(
            choices=list(choices),
            normalized_prompt_logprobs=[_mean(one[0]) for one in scored],
            input_token_logprobs=[one[0] for one in scored],
            output_token_logprobs=[one[1] for one in scored],
            unconditional_token_logprobs=unconditional,
        )

    def commit_lazy_operations(self, s: Any) -> None:
        """Compute what all branches of a fork share.

        Fused KV is never published as exact, so with chunks it is their stored KV that the
        branches share, and nothing has to be computed now unless a chunk is missing.
        """
        prompt = self.lay_out(s.text_, room=1)
        if prompt.spans and not self.fusion.is_exact:
            self._build(prompt.ids, prompt.spans)
        elif prompt.ids:
            self.send({"input_ids": list(prompt.ids), "sampling_params": {"max_new_tokens": 0}})

    def cache_prefix(self, prefix_str: str) -> None:
        """Compute the text that the programs of a batch share."""
        ids, spans = self.encode(prefix_str)
        shared = ids[: spans[0].start] if spans else ids
        if shared:
            self.send({"input_ids": list(shared), "sampling_params": {"max_new_tokens": 0}})

    # -- requests -----------------------------------------------------------------------------

    def lay_out(self, text: str, *, room: int) -> _Prompt:
        """Encode a program's text, without its oldest turns where it would not leave room for so many tokens."""
        ids, spans = self.encode(text)
        whole = _Prompt(ids=ids, spans=spans)
        limit = self.context_length - room
        starts = turn_starts(text) if limit > 0 and len(whole.ids) > limit else ()
        if len(starts) < 2:
            return whole
        encode = self.encoder.tokenizer.encode
        lengths = [
            estimated_tokens(str.__str__(text)[start:end], encode)
            for start, end in itertools.pairwise(starts)
        ]

        def left(cut: int) -> _Prompt:
            if not cut:
                return whole
            kept_ids, kept_spans = self.encode(without_turns(text, starts, cut))
            return _Prompt(ids=kept_ids, spans=kept_spans, cut=truncated(lengths, cut))

        made, _ = first_that_fits(
            lengths,
            left,
            lambda prompt: len(prompt.ids) <= limit,
            context_length=self.context_length,
            truncation=self.truncation,
        )
        return made

    def _prompt_of(self, s: Any, sampling_params: Any) -> _Prompt:
        if s.images_:
            raise RagPipelineError(
                "images cannot stand in a program of this backend; leave them out"
            )
        return self.lay_out(s.text_, room=int(sampling_params.max_new_tokens))

    def _request(self, s: Any, prompt: _Prompt, sampling_params: Any) -> dict[str, Any]:
        ids, spans = prompt.ids, prompt.spans
        if self.build_missing:
            self._build(ids, spans)
        conversation = s.sid if self.keep_turns else ""
        fusion = self.fusion.request(spans, conversation=conversation)
        if not self.fusion.is_exact:
            fusion = dataclasses.replace(fusion, truncated=(prompt.cut.turns, prompt.cut.tokens))
        fields = {
            name: value
            for name in _LOGPROB_FIELDS
            if (value := getattr(sampling_params, name, None)) is not None
        }
        return {
            "input_ids": list(ids),
            "sampling_params": {
                "skip_special_tokens": global_config.skip_special_tokens_in_output,
                "spaces_between_special_tokens": (
                    global_config.spaces_between_special_tokens_in_out
                ),
                **sampling_params.to_srt_kwargs(),
            },
            "kv_hints": fusion.to_kv_hints(),
            **fields,
        }

    def _build(self, ids: Sequence[int], spans: Sequence[Span]) -> None:
        if not self.build_missing or not spans:
            return
        prefix = tuple(ids[: spans[0].start])
        for span in spans:
            chunk = tuple(ids[span.start : span.end])
            # One at a time: a second thread that needs the chunk must find it finished.
            with self._build_lock:
                if (prefix, chunk) in self._built:
                    continue
                for fusion in build_requests(len(prefix), len(chunk)):
                    self.send(
                        {
                            "input_ids": [*prefix, *chunk],
                            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                            "kv_hints": fusion.to_kv_hints(),
                        }
                    )
                self._built.add((prefix, chunk))

    def _score(self, before: Sequence[int], choice: Sequence[int]) -> tuple[list[Any], list[Any]]:
        entries, output = self._logprobs([*before, *choice], max(len(before) - 1, 0))
        return entries[-len(choice) :] if choice else [], output

    def _logprobs(self, ids: Sequence[int], start: int) -> tuple[list[Any], list[Any]]:
        answer = self.send(
            {
                "input_ids": list(ids),
                "sampling_params": {"max_new_tokens": 0, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": start,
            }
        )
        meta = answer["meta_info"]
        return meta["input_token_logprobs"], meta["output_token_logprobs"]


def _mean(entries: Sequence[Any]) -> float:
    values = [entry[0] for entry in entries if entry[0] is not None]
    return sum(values) / len(values) if values else float("-inf")
