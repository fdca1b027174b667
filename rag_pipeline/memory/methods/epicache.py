"""EpiCache (arXiv 2509.17396) as a memory: a record per episode of the conversation, each kept for its own questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rag_pipeline.memory.chains import Recipe
from rag_pipeline.memory.clustering import unit
from rag_pipeline.memory.matching import votes
from rag_pipeline.memory.methods.chained import ChainedMethod
from rag_pipeline.memory.owned import own_spans
from rag_pipeline.memory.probes import patched_probe

if TYPE_CHECKING:
    from rag_pipeline.memory.clustering import Episode
    from rag_pipeline.memory.conversation import View
    from rag_pipeline.memory.growth import Version
    from rag_pipeline.memory.layout import Question
    from rag_pipeline.memory.plan import Range


class EpiCache(ChainedMethod):
    """Loads the record of the episode that the segments nearest to the question vote for (:mod:`rag_pipeline.memory.matching`).

    Every record has seen the whole history; they differ in the text that decides what stays: the segments that stand for the
    episode. Where the paper is silent, see :mod:`rag_pipeline.memory.growth` for a conversation that grows and for a
    switch of topic. A question whose second-best episode is within :attr:`~.MemoryConfig.merge_margin` of the best is answered
    from both records, merged to the size of one.

    Deviation: tokens of the episode's own segments stay before others in :attr:`~.MemoryConfig.own_share` of the budget
    (:mod:`rag_pipeline.memory.owned`); 0 is the published rule. The messages nearest to the question stand behind the record word
    for word, in :attr:`~.MemoryConfig.retrieved_share` of the budget.

    https://arxiv.org/abs/2509.17396
    """

    name = "epicache"
    retrieves = True

    def recipes(self, view: View, question: Question | None) -> Sequence[Recipe]:
        """Those of the newest version."""
        version = view.versions()[0]
        recipes = self._of_version(view, version)
        return [recipes[place] for place, _ in self._ranked(view, version, question)]

    def probe_tokens(self) -> int:
        """The patched prompt."""
        return self.config.probe_tokens

    def choices(
        self, view: View, question: Question | None
    ) -> Iterator[Sequence[Sequence[Recipe]]]:
        """The best episode, in front of it the best two where the second is about as good."""
        for version in view.versions():
            recipes = self._of_version(view, version)
            ranked = self._ranked(view, version, question)
            best = recipes[ranked[0][0]]
            both = []
            if len(ranked) > 1 and ranked[0][1] - ranked[1][1] < self.config.merge_margin:
                both = [[best, recipes[ranked[1][0]]]]
            yield [*both, [best]]

    def _ranked(
        self, view: View, version: Version, question: Question | None
    ) -> list[tuple[int, float]]:
        """Episodes with their share of the question's votes, the best first; without one, the latest topic first."""
        count = len(version.episodes_at(view.num_segments))
        if count == 1:
            return [(0, 1.0)]
        if question is None:
            latest = view.latest_episode(version)
            return sorted(((place, float(place == latest)) for place in range(count)), key=_last)
        labels = view.labels(version)  # of an older version, up to the next clustering
        shares = votes(question.near_segments[: len(labels)], labels, count)
        near = np.stack([unit(centre) for centre in view.centres(version)]) @ question.vector
        order = sorted(range(count), key=lambda place: (-shares[place], -near[place], place))
        return [(place, float(shares[place])) for place in order]

    def _of_version(self, view: View, version: Version) -> list[Recipe]:
        recipes: list[Recipe] = []
        for episode in version.episodes_at(view.num_segments):
            block = view.segment_start(episode.branch_segment) // self.config.block_tokens
            recipes.append(
                Recipe(
                    key=(self.name, version.number, episode.index),
                    rule=self.rule,
                    probe=self._probe(view, version, episode),
                    episode=episode.index,
                    parent=None if episode.parent is None else recipes[episode.parent],
                    branch=block,
                    own=partial(self._own, view, version, episode),
                )
            )
        return recipes

    def _own(self, view: View, version: Version, episode: Episode, block: int) -> tuple[Range, ...]:
        return own_spans(view, version, episode, block) if self.config.own_share else ()

    def _probe(
        self, view: View, version: Version, episode: Episode
    ) -> Callable[[Sequence[int]], tuple[int, ...]]:
        key = (version.number, episode.index)
        log, room = view.log, self.config.probe_tokens

        def probe(block_ids: Sequence[int]) -> tuple[int, ...]:
            if key not in log.probes:
                texts = [view.segment_text(segment) for segment in sorted(episode.medoids)]
                log.probes[key] = patched_probe(view.renderer, texts, room)
            return log.probes[key]

        return probe


def _last(ranked: tuple[int, float]) -> tuple[float, int]:
    return (-ranked[1], ranked[0])
