"""What is known of a conversation: its tokens, its episodes, the ids of its records; each computed once while it grows.

A client sends the whole conversation each time and nothing identifies it but its content, so it is found by a chain of digests over
its messages. What is kept here saves time only: a table that has lost a conversation replays it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock, RLock
from typing import TYPE_CHECKING

from rag_pipeline.memory.bounded import BoundedTable
from rag_pipeline.memory.config import MemoryConfig
from rag_pipeline.memory.growth import Growth, Version
from rag_pipeline.memory.matching import Words
from rag_pipeline.memory.plan import Range, Utterance
from rag_pipeline.memory.rendering import Renderer

if TYPE_CHECKING:
    from rag_pipeline.memory.clustering import Vectors

_CONVERSATIONS = 64
_VECTORS = 16_384


class TextVectors:
    """Sentence vectors of texts that come again, each computed once.

    Parameters
    ----------
    encode : callable
        Texts to unit vectors, float32 ``(len(texts), dim)``.
    """

    def __init__(self, encode: Callable[[list[str]], Vectors]) -> None:
        self._encode = encode
        self._known: BoundedTable[str, Vectors] = BoundedTable(_VECTORS)

    def of(self, texts: Sequence[str]) -> list[Vectors]:
        """Vectors of the texts, ``(dim,)`` each."""
        found = {text: self._known.get(text) for text in texts}
        new = [text for text, vector in found.items() if vector is None]
        if new:
            for text, vector in zip(new, self._encode(new), strict=True):
                found[text] = vector
                self._known.put(text, vector)
        return [vector for text in texts if (vector := found[text]) is not None]


class ConversationLog:
    """One conversation as far as it was seen; everything in it is only added to, so a shorter history is a view of it.

    Parameters
    ----------
    prefix_ids : tuple of int
        Tokens in front of the history.
    config : MemoryConfig
        For the episodes.
    """

    def __init__(self, prefix_ids: tuple[int, ...], config: MemoryConfig) -> None:
        self.prefix_ids = prefix_ids
        self.utterances: list[Utterance] = []
        self.tokens: list[int] = []
        self.ends: list[int] = []
        self.keys: list[bytes] = []
        self.growth = Growth(config)
        self.chain_ids: dict[Hashable, list[str]] = {}
        self.probes: dict[Hashable, tuple[int, ...]] = {}
        self.words: tuple[int, Words] | None = None
        self.lock = RLock()

    def append(self, utterance: Utterance, ids: Sequence[int], key: bytes) -> None:
        """Add a message."""
        self.tokens.extend(ids)
        self.ends.append(len(self.tokens))
        self.utterances.append(utterance)
        self.keys.append(key)


class View:
    """A history: a conversation up to one of its messages.

    Parameters
    ----------
    log : ConversationLog
        The conversation.
    count : int
        Messages of the history.
    config : MemoryConfig
        Block and segment.
    vectors : TextVectors
        Of segments and messages.
    renderer : Renderer
        Of the model.
    """

    def __init__(
        self,
        log: ConversationLog,
        count: int,
        config: MemoryConfig,
        vectors: TextVectors,
        renderer: Renderer,
    ) -> None:
        self.log = log
        self.count = count
        self.config = config
        self.vectors = vectors
        self.renderer = renderer

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Tokens in front of the history."""
        return self.log.prefix_ids

    @property
    def last_role(self) -> str | None:
        """Role of the last message; None for an empty history."""
        return self.log.utterances[self.count - 1].role if self.count else None

    @property
    def num_tokens(self) -> int:
        """Tokens of the history."""
        return self.log.ends[self.count - 1] if self.count else 0

    @property
    def num_blocks(self) -> int:
        """Whole blocks of the history."""
        return self.num_tokens // self.config.block_tokens

    @property
    def num_segments(self) -> int:
        """Whole segments of the history."""
        return self.count // self.config.segment_utterances

    def ids(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens ``[start, end)`` of the history."""
        return tuple(self.log.tokens[start : min(end, self.num_tokens)])

    def message_range(self, message: int) -> Range:
        """Tokens of a message, as the history counts them."""
        return (self.log.ends[message - 1] if message else 0, self.log.ends[message])

    def message_length(self, message: int) -> int:
        """Tokens of a message."""
        start, end = self.message_range(message)
        return end - start

    def message_at(self, token: int) -> int:
        """Message that a token of the history belongs to."""
        return bisect_right(self.log.ends, token, hi=self.count)

    def segment_text(self, segment: int) -> str:
        """Text of a segment, one message per line."""
        size = self.config.segment_utterances
        return "\n".join(
            said.text for said in self.log.utterances[segment * size : (segment + 1) * size]
        )

    def segment_start(self, segment: int) -> int:
        """First token of a segment, as the history counts them."""
        message = segment * self.config.segment_utterances
        return self.log.ends[message - 1] if message else 0

    def versions(self) -> list[Version]:
        """Clusterings of the history, the newest first; segments that were not seen before are embedded."""
        growth = self.log.growth
        with self.log.lock:
            new = range(len(growth), self.num_segments)
            for vector in self.vectors.of([self.segment_text(segment) for segment in new]):
                growth.add(vector)
            return growth.versions_at(self.num_segments)

    def centres(self, version: Version) -> Vectors:
        """Mean vector of each episode, ``(episodes, dim)``."""
        with self.log.lock:
            return self.log.growth.centres(version, self.num_segments)

    def latest_episode(self, version: Version) -> int:
        """Episode of the last segment."""
        with self.log.lock:
            return version.label_at(self.num_segments - 1, self.num_segments)

    def labels(self, version: Version) -> list[int]:
        """Episode of each segment."""
        with self.log.lock:
            return version.labels_at(self.num_segments)

    def segment_vectors(self, segments: int) -> list[Vectors]:
        """Vectors of the first segments, ``(dim,)`` each."""
        return self.vectors.of([self.segment_text(segment) for segment in range(segments)])

    def segment_words(self, segments: int) -> Words:
        """BM25 of the first segments; kept until the conversation has another number."""
        with self.log.lock:
            known = self.log.words
            if known is None or known[0] != segments:
                texts = [self.segment_text(segment) for segment in range(segments)]
                known = self.log.words = (segments, Words(texts))
            return known[1]


class Conversations:
    """Finds a history's conversation, or begins one.

    Parameters
    ----------
    renderer : Renderer
        Messages to token ids.
    config : MemoryConfig
        Block, segment, episodes.
    vectors : TextVectors
        Of segments and messages.
    """

    def __init__(self, renderer: Renderer, config: MemoryConfig, vectors: TextVectors) -> None:
        self._renderer = renderer
        self._config = config
        self._vectors = vectors
        self._logs: OrderedDict[int, ConversationLog] = OrderedDict()
        self._places: dict[bytes, tuple[ConversationLog, int]] = {}
        self._lock = Lock()

    def view(self, system: str, history: Sequence[Utterance]) -> View:
        """Return the history's view; only messages that were not seen behind these are tokenised.

        Parameters
        ----------
        system : str
            System prompt.
        history : sequence of Utterance
            Checked messages, none of them empty.
        """
        if not history:  # nothing to find again: it takes no place from the others
            return self._view_of(self._new_log(system, "user"), 0)
        key = hashlib.blake2b(system.strip().encode(), digest_size=16).digest()
        keys = [key]
        for said in history:
            key = hashlib.blake2b(
                b"\0".join((key, said.role.encode(), said.text.encode())), digest_size=16
            ).digest()
            keys.append(key)
        with self._lock:
            known = next((n for n in range(len(history), 0, -1) if keys[n] in self._places), 0)
            log, seen = self._places[keys[known]] if known else (None, 0)
            if log is None or (len(log.keys) > seen < len(history)):
                # A new one, or one that left a known one.
                log = self._new_log(system, history[0].role)
                self._logs[id(log)] = log
            self._extend(log, history, keys)
            self._logs.move_to_end(id(log))
            self._drop_oldest()
        return self._view_of(log, len(history))

    def _view_of(self, log: ConversationLog, count: int) -> View:
        return View(log, count, self._config, self._vectors, self._renderer)

    def _new_log(self, system: str, first_role: str) -> ConversationLog:
        return ConversationLog(self._renderer.prefix_ids(system, first_role), self._config)

    def _extend(
        self, log: ConversationLog, history: Sequence[Utterance], keys: Sequence[bytes]
    ) -> None:
        for place in range(len(log.utterances), len(history)):
            said = history[place]
            before = history[place - 1].role if place else None
            log.append(said, self._renderer.message_ids(before, said), keys[place + 1])
            self._places[keys[place + 1]] = (log, place + 1)

    def _drop_oldest(self) -> None:
        while len(self._logs) > _CONVERSATIONS:
            _, oldest = self._logs.popitem(last=False)
            for key in oldest.keys:
                if self._places.get(key, (None, 0))[0] is oldest:
                    del self._places[key]
