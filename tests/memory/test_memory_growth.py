"""Episodes of a conversation that grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conversations import chat

from rag_pipeline.memory import MemoryConfig
from rag_pipeline.memory.clustering import cluster, medoids_of
from rag_pipeline.memory.growth import Growth


def vectors_of(encode: Callable[[list[str]], Any], *runs: tuple[str, int]) -> Any:
    said = chat(*runs)
    texts = ["\n".join(one.text for one in said[i : i + 4]) for i in range(0, len(said), 4)]
    return encode(texts)


def grown(config: MemoryConfig, vectors: Any) -> Growth:
    growth = Growth(config)
    for vector in vectors:
        growth.add(vector)
    return growth


def test_topics_become_episodes_in_the_order_of_their_first_segment(
    encode: Callable[[list[str]], Any],
) -> None:
    vectors = vectors_of(encode, ("garden", 8), ("music", 8), ("garden", 4), ("travel", 8))
    assert cluster(vectors, 3) == [0, 0, 1, 1, 0, 2, 2]


def test_a_medoid_is_the_segment_with_the_largest_sum_of_similarities() -> None:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(9, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    members = [1, 3, 4, 7, 8]
    # The centre is the mean, so the nearest to it has the largest similarity to all members together.
    sums = {one: float(sum(vectors[one] @ vectors[other] for other in members)) for one in members}
    assert medoids_of(vectors, members, 3) == tuple(sorted(members, key=lambda one: -sums[one])[:3])
    twins = np.stack([vectors[0], vectors[1], vectors[0], vectors[1]])
    assert medoids_of(twins, [2, 3], 1) == (2,)  # two are as near: the earlier


def test_fewer_different_segments_than_episodes_are_no_fault() -> None:
    one = np.eye(1, 8, dtype=np.float32)
    assert cluster(np.repeat(one, 5, axis=0), 4) == [0] * 5


def test_a_new_segment_joins_the_nearest_and_medoids_stay(
    encode: Callable[[list[str]], Any],
) -> None:
    config = MemoryConfig(episodes=2, cluster_segments=2, recluster_growth=100.0, switch_segments=0)
    vectors = vectors_of(encode, ("garden", 8), ("music", 8), ("garden", 4), ("music", 4))
    growth = grown(config, vectors)
    version = growth.versions[-1]
    assert (version.number, version.made_at) == (1, 4)
    assert version.labels_at(6) == [0, 0, 1, 1, 0, 1]
    assert [sorted(episode.medoids) for episode in version.episodes] == [[0, 1], [2, 3]]


def around(*topics: int) -> Any:
    """Unit vectors close to axes, with a little noise."""
    rng = np.random.default_rng(1)
    vectors = np.eye(16, dtype=np.float32)[list(topics)]
    vectors += rng.normal(scale=0.05, size=vectors.shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_switch_of_topic_opens_an_episode_that_branches_off() -> None:
    config = MemoryConfig(episodes=2, cluster_segments=2, recluster_growth=100.0, switch_segments=2)
    growth = grown(config, around(0, 0, 1, 1, 7, 7, 7, 0))
    version = growth.versions[-1]
    assert version.labels_at(8) == [0, 0, 1, 1, 2, 2, 2, 0]
    opened = version.episodes[2]
    assert (opened.opened_at, opened.branch_segment, set(opened.medoids)) == (6, 4, {4, 5})
    assert opened.parent in (0, 1)
    # A history that ends before the switch does not know of it.
    assert len(version.episodes_at(5)) == 2
    assert 2 not in version.labels_at(5)


def test_one_segment_off_topic_is_no_switch() -> None:
    config = MemoryConfig(episodes=2, cluster_segments=2, recluster_growth=100.0, switch_segments=2)
    growth = grown(config, around(0, 0, 1, 1, 7, 0, 7, 1, 7))
    assert len(growth.versions[-1].episodes) == 2


def test_switches_are_bounded() -> None:
    config = MemoryConfig(episodes=2, cluster_segments=2, recluster_growth=100.0, switch_segments=1)
    growth = grown(config, around(0, 0, 1, 1, *range(2, 14)))
    assert len(growth.versions[-1].episodes) == 4


def test_a_conversation_that_drifts_is_clustered_again(encode: Callable[[list[str]], Any]) -> None:
    vectors = vectors_of(encode, ("garden", 12), ("music", 12), ("travel", 24))
    made_at = {}
    for drift in (0.0, 50.0):
        config = MemoryConfig(
            episodes=2, cluster_segments=2, recluster_drift=drift, switch_segments=0
        )
        made_at[drift] = [version.made_at for version in grown(config, vectors).versions]
    assert made_at == {0.0: [0, 4, 6, 9], 50.0: [0, 4]}


def test_a_shorter_history_is_what_it_was_in_every_version() -> None:
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(40, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    config = MemoryConfig(episodes=2, recluster_drift=0.0, switch_segments=2)
    growth = grown(config, vectors)
    assert len(growth.versions) > 4
    for segments in range(1, 40):
        replay = grown(config, vectors[:segments])
        known, wanted = growth.versions_at(segments), replay.versions_at(segments)
        assert [one.number for one in known] == [one.number for one in wanted]
        for one, other in zip(known, wanted, strict=True):
            assert one.episodes_at(segments) == other.episodes_at(segments)
            assert one.labels_at(segments) == other.labels_at(segments)
            if one.number:
                centres = growth.centres(one, segments), replay.centres(other, segments)
                np.testing.assert_allclose(*centres, atol=1e-5)


@pytest.mark.parametrize("growth_factor", [1.5, 2.0])
def test_clustering_again_costs_a_constant_number_of_passes(growth_factor: float) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    config = MemoryConfig(
        episodes=3, recluster_drift=0.0, recluster_growth=growth_factor, switch_segments=0
    )
    versions = grown(config, vectors).versions
    passes = sum(version.made_at for version in versions) / len(vectors)
    assert len(versions) > 4
    assert passes <= 1 / (1 - 1 / growth_factor)


def test_the_running_centres_are_those_of_the_labels() -> None:
    config = MemoryConfig(episodes=2, cluster_segments=2, recluster_growth=100.0, switch_segments=2)
    vectors = around(0, 0, 1, 1, 7, 7, 7)
    growth = grown(config, vectors)
    version = growth.versions[-1]
    assert len(version.episodes) == 3
    labels = np.asarray(version.labels_at(7))
    for index, centre in enumerate(growth.centres(version, 7)):
        np.testing.assert_allclose(centre, vectors[labels == index].mean(axis=0), atol=1e-6)
    # An older history has its own.
    older = grown(config, vectors[:5])
    np.testing.assert_allclose(
        growth.centres(version, 5), older.centres(older.versions[-1], 5), atol=1e-6
    )
