"""Episodes of a conversation that grows: what the paper, which clusters once, leaves open.

A replay: segments are taken in one by one, and everything follows from them and from those before. Three rules:

* A new segment joins the episode whose centre is nearest. The segments that stand for an episode, and with them its
  records, stay as they are.
* When the history is :attr:`~.MemoryConfig.recluster_growth` times as long as at the last clustering, and the segments that joined
  since then lie :attr:`~.MemoryConfig.recluster_drift` times as far from their episodes, everything is clustered again: a new
  version. Each version costs one pass over the history, and their lengths form a geometric series, so
  building costs a constant number of passes per token, however long a conversation becomes.
* :attr:`~.MemoryConfig.switch_segments` consecutive segments that all lie farther from every episode than any that was clustered, and closer to unrelated, are a
  switch of topic: they open an episode of their own. Its record branches off that of the episode they had joined, so
  nothing is built again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rag_pipeline.memory.clustering import (
    Episode,
    centres_of,
    cluster,
    medoids_of,
    own_distances,
    unit,
)
from rag_pipeline.memory.config import MemoryConfig

if TYPE_CHECKING:
    from rag_pipeline.memory.clustering import Vectors

_EPISODES_PER_CLUSTER = 2
"""Episodes of one version, switches included, per episode that was asked for."""


@dataclass(kw_only=True, slots=True)
class Version:
    """One clustering, and what joined it. `episodes` and `labels` only grow, so what holds of a shorter history is in them.

    Attributes
    ----------
    number : int
        How many clusterings were before.
    made_at : int
        Segments that were clustered; 0 for the version before the first clustering.
    episodes : list of Episode
        In the order in which they were opened.
    labels : list of list of (int, int)
        Per segment the episodes that it belonged to, each with the number of segments from which on: a switch of topic takes
        segments along.
    spread : float
        Mean distance of clustered segments from the others of their episode.
    reach : float
        The largest of these distances.
    sums, counts : list of ndarray, list of int
        Sum and number of each episode's vectors, as of the last segment.
    anchors : list of ndarray
        Centre of each episode when it was opened, unit length.
    joined, joined_distance : int, float
        Segments that joined since, and the sum of their distances from the episodes that they joined.
    far : int
        How many of the last ones in a row lay farther than `reach`.
    """

    number: int
    made_at: int
    episodes: list[Episode]
    labels: list[list[tuple[int, int]]]
    spread: float = 0.0
    reach: float = 2.0
    sums: list[Vectors] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    anchors: list[Vectors] = field(default_factory=list)
    joined: int = 0
    joined_distance: float = 0.0
    far: int = 0

    def episodes_at(self, segments: int) -> list[Episode]:
        """Episodes that a history of so many segments has."""
        return [episode for episode in self.episodes if episode.opened_at <= segments]

    def labels_at(self, segments: int) -> list[int]:
        """Episode of each of the first `segments` segments, as it was when there were so many.

        Of a version that another has replaced, those until then.
        """
        known = min(segments, len(self.labels))
        return [self.label_at(segment, segments) for segment in range(known)]

    def label_at(self, segment: int, segments: int) -> int:
        """Episode of a segment when there were `segments`."""
        row = self.labels[segment]
        return next(label for label, since in reversed(row) if since <= segments)


class Growth:
    """Takes in segments one by one.

    Parameters
    ----------
    config : MemoryConfig
        Episodes, and when to cluster again.
    """

    def __init__(self, config: MemoryConfig) -> None:
        self._config = config
        self._vectors: list[Vectors] = []
        whole = Episode(index=0, medoids=(), opened_at=0)
        self.versions: list[Version] = [Version(number=0, made_at=0, episodes=[whole], labels=[])]

    def __len__(self) -> int:
        """Segments so far."""
        return len(self._vectors)

    def add(self, vector: Vectors) -> None:
        """Take in the next segment's vector: unit length, ``(dim,)`` float32."""
        self._vectors.append(vector)
        version = self.versions[-1]
        if version.number:
            self._join(version, vector)
            self._switch(version)
        else:
            version.labels.append([(0, 0)])
        if self._is_due(version):
            self.versions.append(self._cluster(version.number + 1))

    def versions_at(self, segments: int) -> list[Version]:
        """Versions that a history of so many segments has, the newest first."""
        return [version for version in reversed(self.versions) if version.made_at <= segments]

    def centres(self, version: Version, segments: int) -> Vectors:
        """Mean of each episode's segments, ``(episodes, dim)``, when there were so many segments."""
        if segments == len(self) and version.sums:
            return np.stack(
                [total / max(1, n) for total, n in zip(version.sums, version.counts, strict=True)]
            )
        labels = version.labels_at(segments)
        return centres_of(self.vectors(segments), labels, len(version.episodes_at(segments)))

    def vectors(self, segments: int) -> Vectors:
        """The first vectors, ``(segments, dim)``."""
        return np.stack(self._vectors[:segments])

    def _join(self, version: Version, vector: Vectors) -> None:
        near = [float(unit(total) @ vector) for total in version.sums]
        nearest = int(np.argmax(near))
        version.labels.append([(nearest, 0)])
        version.sums[nearest] = version.sums[nearest] + vector
        version.counts[nearest] += 1
        distance = 1 - near[nearest]
        version.joined += 1
        version.joined_distance += distance
        # From the centres as they were found: the first segment of a new topic draws the one that it joins after it. The
        # reach of a few segments is small by chance, so far is also what lies closer to unrelated than to an episode.
        away = 1 - max(float(anchor @ vector) for anchor in version.anchors)
        is_far = away > max(version.reach, (version.spread + 1) / 2)
        version.far = version.far + 1 if is_far else 0

    def _switch(self, version: Version) -> None:
        """Open an episode for the last segments, if all of them lie far from every other."""
        wanted, now = self._config.switch_segments, len(self)
        if not wanted or version.far < wanted:
            return
        if len(version.episodes) >= _EPISODES_PER_CLUSTER * self._config.episodes:
            return
        first = now - wanted
        members = list(range(first, now))
        parent = version.labels_at(now)[first]
        opened = Episode(
            index=len(version.episodes),
            medoids=medoids_of(self.vectors(now), members, self._config.medoids),
            opened_at=now,
            parent=parent,
            branch_segment=first,
        )
        version.episodes.append(opened)
        version.sums.append(np.zeros_like(self._vectors[0]))
        version.counts.append(0)
        version.anchors.append(unit(np.sum(self._vectors[first:], axis=0)))
        for member in members:
            left, _ = version.labels[member][-1]
            version.labels[member].append((opened.index, now))
            for label, sign in ((left, -1), (opened.index, 1)):
                version.sums[label] = version.sums[label] + sign * self._vectors[member]
                version.counts[label] += sign
        version.far = 0

    def _is_due(self, version: Version) -> bool:
        now, config = len(self), self._config
        if config.episodes == 1 and version.number:
            return False
        if not version.number:
            return now >= config.first_clustering
        if now < version.made_at * config.recluster_growth or not version.joined:
            return False
        return version.joined_distance / version.joined > config.recluster_drift * version.spread

    def _cluster(self, number: int) -> Version:
        vectors = self.vectors(len(self))
        labels = cluster(vectors, self._config.episodes)
        distances = own_distances(vectors, labels)
        episodes = self._episodes(vectors, labels)
        counts = [labels.count(episode.index) for episode in episodes]
        centres = centres_of(vectors, labels, len(episodes))
        return Version(
            number=number,
            made_at=len(self),
            episodes=episodes,
            labels=[[(label, 0)] for label in labels],
            sums=[centre * count for centre, count in zip(centres, counts, strict=True)],
            counts=counts,
            anchors=[unit(centre) for centre in centres],
            spread=float(np.mean(distances)) if distances else 0.0,
            reach=max(distances, default=2.0),
        )

    def _episodes(self, vectors: Vectors, labels: Sequence[int]) -> list[Episode]:
        made = []
        for index in range(max(labels) + 1):
            members = [segment for segment, label in enumerate(labels) if label == index]
            chosen = medoids_of(vectors, members, self._config.medoids)
            made.append(Episode(index=index, medoids=chosen, opened_at=len(vectors)))
        return made
