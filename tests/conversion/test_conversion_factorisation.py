"""Latent forms: exact where nothing must be given up, and the better the more is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion_parts import WINDOW, Sample, sample_of
from torch import Tensor

from rag_pipeline.conversion import ConversionConfig
from rag_pipeline.conversion.factorisation import as_real, factorise, roots
from rag_pipeline.conversion.refit import Ridge
from rag_pipeline.conversion.source import SourceWeights, read_shape
from rag_pipeline.conversion.statistics import LayerStatistics
from rag_pipeline.conversion.streams import convert_layer, embed


def outputs(sample: Sample, rope_heads: int, latent: int) -> tuple[Tensor, float]:
    found, lost = factorise(
        sample.layer, sample.statistics, sample.shape, rope_heads=rope_heads, latent=latent
    )
    return torch.stack([found.heads_out(h, sample.turn) for h in sample.inputs]), lost


def test_a_complex_map_per_frequency_becomes_one_real_matrix() -> None:
    maps = torch.randn(5, 2, 3, dtype=torch.complex128)
    x = torch.randn(3, 5, dtype=torch.complex128)
    wanted = torch.einsum("frc,cf->rf", maps, x)
    real = torch.stack([x.real, x.imag], 1).flatten()
    got = (as_real(maps) @ real).view(2, 2, 5)
    torch.testing.assert_close(torch.complex(got[:, 0], got[:, 1]), wanted)


def test_with_all_heads_positioned_and_all_values_nothing_is_lost(sample: Sample) -> None:
    width = sample.shape.kv_width
    got, lost = outputs(sample, sample.shape.kv_heads, width)
    torch.testing.assert_close(got, sample.original(), rtol=1e-4, atol=1e-5)
    assert lost < 1e-9


@pytest.mark.parametrize("fields", [{"num_key_value_heads": 1}, {"related": True}])
def test_one_position_part_suffices_where_heads_turn_alike(
    llama: Callable[..., Path], fields: dict[str, object]
) -> None:
    """A single head, or heads whose keys differ by a factor and an angle per frequency."""
    sample = sample_of(llama(**fields))
    got, _ = outputs(sample, 1, sample.shape.kv_width)
    torch.testing.assert_close(got, sample.original(), rtol=1e-4, atol=1e-4)


def test_the_latent_loses_less_the_larger_it_is_and_nothing_at_full_size(sample: Sample) -> None:
    head, width = sample.shape.head_dim, sample.shape.kv_width
    sizes = list(range(head, 2 * width - head + 1, head))
    lost = [outputs(sample, 1, size)[1] for size in sizes]
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 0.01
    assert lost[-1] < 1e-9


def test_values_are_exact_at_full_latent_even_where_positions_are_given_up(sample: Sample) -> None:
    """A window of one token attends to itself: distance 0, no position to lose."""
    one = replace(sample, inputs=sample.inputs[:, :1], turn=sample.turn[:1])
    got, _ = outputs(one, 1, 2 * sample.shape.kv_width - sample.shape.head_dim)
    torch.testing.assert_close(got, one.original(), rtol=1e-4, atol=1e-5)


def test_attention_at_one_distance_gives_the_turn_of_that_distance(sample: Sample) -> None:
    frequencies = sample.shape.frequencies
    statistics = LayerStatistics.empty(sample.shape, WINDOW)
    statistics.reach_HW[0, 5] = 2.0
    statistics.reach_HW[1, [1, 3]] = 1.0
    mean = statistics.mean_rotations(frequencies)
    torch.testing.assert_close(mean[0], torch.polar(torch.ones_like(frequencies), -5 * frequencies))
    cosines = frequencies.cos()  # turns by 1 and 3: that of 2, shortened
    wanted = torch.polar(cosines.abs(), -2 * frequencies + (cosines < 0) * torch.pi)
    torch.testing.assert_close(mean[1], wanted)
    assert mean[2].abs().min() == 1  # a head that reaches nothing keeps everything


def test_statistics_count_attention_by_distance_but_not_to_the_first_token(sample: Sample) -> None:
    reach = sample.statistics.reach_HW.sum()
    everything = sample.shape.heads * sample.statistics.tokens
    assert 0 < reach < everything
    assert sample.statistics.tokens == len(sample.inputs) * WINDOW


def test_roots_are_a_matrix_and_its_inverse() -> None:
    half = torch.randn(6, 9, dtype=torch.float64)
    metric = half @ half.T
    root, inverse = roots(metric)
    torch.testing.assert_close(root @ root, metric, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(root @ inverse, torch.eye(6, dtype=torch.float64))
    root, inverse = roots(torch.zeros(3, 3, dtype=torch.float64))
    torch.testing.assert_close(root @ inverse, torch.eye(3, dtype=torch.float64))


def test_the_refit_finds_the_map_that_made_the_targets() -> None:
    x, true = torch.randn(200, 12), torch.randn(5, 12)
    fit = Ridge.empty(12, 5)
    for part in x.split(50):
        fit.add(part, part @ true.T)
    torch.testing.assert_close(fit.solve(torch.zeros(5, 12), 0.0), true, rtol=1e-4, atol=1e-4)


def test_the_refit_stays_at_the_known_map_where_it_is_held_or_knows_nothing() -> None:
    known = torch.randn(5, 12)
    fit = Ridge.empty(12, 5)
    torch.testing.assert_close(fit.solve(known, 0.1), known)
    x = torch.randn(50, 12)
    fit.add(x, x @ torch.randn(12, 5))
    torch.testing.assert_close(fit.solve(known, 1e9), known, rtol=1e-4, atol=1e-4)
    # One row leaves eleven directions open: they stay as they are.
    alone = Ridge.empty(12, 5)
    alone.add(x[:1], torch.zeros(1, 5))
    found = alone.solve(known, 1e-3)
    torch.testing.assert_close(found @ x[0], torch.zeros(5), rtol=0, atol=0.05)
    across = x[1] - x[0] * (x[0] @ x[1]) / x[0].square().sum()
    torch.testing.assert_close(found @ across, known @ across, rtol=1e-2, atol=1e-2)


def test_the_refit_brings_the_streams_nearer(llama: Callable[..., Path]) -> None:
    """A layer behind which the original's stream is known: errors count by the size of the stream at a token."""
    shape, weights = read_shape(llama()), SourceWeights(llama())
    rows = torch.randint(2, 400, (8, WINDOW), generator=torch.Generator().manual_seed(1))
    apart = {}
    for refit in (False, True):
        streams = embed(rows, weights.embedding())
        streams.original[:, 3] *= 100  # a token that would decide alone
        streams.converted[:, 3] *= 101
        config = ConversionConfig(rope=16, latent=16, refit=refit, ridge=1e-3)
        with torch.inference_mode():
            layer = replace(weights.layer(0), down=torch.zeros(shape.hidden, shape.intermediate))
            convert_layer(layer, streams, shape, config)
        apart[refit] = streams.error
    assert apart[True] < 0.95 * apart[False]
