"""TPLA's arithmetic: what is exact is exact, and what is approximate falls in the order that the paper claims."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rag_kernels.latent import (
    BASES,
    LatentRows,
    LatentStatistics,
    LatentWeights,
    StatisticsSum,
    create_basis,
    energy_shares,
    exact_norm,
    gathered_attention,
    gla_attention,
    literal_scales,
    rank_attention,
    rank_slice,
    sliced_norm,
    tpla_attention,
    unsliced_attention,
)

HIDDEN, HEADS, NOPE, ROPE, VALUE, DIM, EPS = 40, 5, 12, 6, 10, 24, 1e-6
SCALE = (NOPE + ROPE) ** -0.5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(decay: float = 0.0, *, gamma: bool = True) -> LatentWeights:
    """Random weights; the latent's coordinates lose energy by exp(-decay), mixed by a random rotation."""
    mix = torch.linalg.qr(random(DIM, DIM, seed=9))[0]
    strength = torch.exp(-decay * torch.arange(DIM))[:, None]
    return LatentWeights(
        down_DX=mix @ (strength * random(DIM, HIDDEN, seed=1)),
        gamma_D=random(DIM, seed=2).exp() if gamma else torch.ones(DIM),
        w_kc_HND=random(HEADS, NOPE, DIM, seed=3) / DIM**0.5,
        w_vc_HDV=random(HEADS, DIM, VALUE, seed=4) / DIM**0.5,
    )


def normed(weights: LatentWeights, hidden: torch.Tensor) -> torch.Tensor:
    """Latents behind the norm, with a weight per entry, as the model has it."""
    latent = hidden @ weights.down_DX.mT
    return (
        latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + EPS) * weights.gamma_D.float()
    )


def rows(weights: LatentWeights, *, asking: int = 19, seen: int = 19) -> LatentRows:
    hidden = random(2, seen, HIDDEN, seed=5)
    return LatentRows(
        q_nope_BTHN=2 * random(2, asking, HEADS, NOPE, seed=6),
        q_rope_BTHR=random(2, asking, HEADS, ROPE, seed=7),
        latent_BSD=normed(weights, hidden),
        k_rope_BSR=random(2, seen, ROPE, seed=8),
    )


def statistics(weights: LatentWeights) -> LatentStatistics:
    total = StatisticsSum(weights, random(HEADS, VALUE, HIDDEN, seed=11))
    hidden = random(4096, HIDDEN, seed=12)
    total.add(random(4096, HEADS, NOPE, seed=13), normed(weights, hidden))
    return total.result()


def close(found: torch.Tensor, wanted: torch.Tensor, relative: float = 1e-4) -> bool:
    return float((found - wanted).norm() / wanted.norm()) < relative


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("asking", [1, 7, 19])
def test_unsliced_attention_in_any_basis_is_that_of_the_checkpoint(name: str, asking: int) -> None:
    weights = layer()
    wanted = unsliced_attention(rows(weights, asking=asking), weights, SCALE)
    folded = weights.folded()
    turned = folded.rotated(create_basis(name, DIM, statistics(folded)))
    found = unsliced_attention(rows(turned, asking=asking), turned, SCALE)
    assert close(found, wanted)
    assert torch.equal(turned.gamma_D, turned.gamma_D[:1].expand(DIM))


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_logits_summed_before_the_softmax_are_those_of_the_whole_latent(
    name: str, ranks: int
) -> None:
    weights = layer()
    wanted = unsliced_attention(rows(weights, asking=7), weights, SCALE)
    folded = weights.folded()
    turned = folded.rotated(create_basis(name, DIM, statistics(folded)))
    found = gathered_attention(rows(turned, asking=7), turned, SCALE, ranks=ranks)
    assert close(found, wanted)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_sum_over_ranks_is_each_slice_under_a_softmax_of_its_own(ranks: int) -> None:
    """Against the formula written out, in the absorbed form that an engine computes."""
    weights = layer(gamma=False)
    given = rows(weights, asking=7)
    scales = [1.0 + 0.5 * rank for rank in range(ranks)]
    wanted = torch.zeros(2, 7, HEADS, VALUE)
    for rank in range(ranks):
        own = rank_slice(DIM, rank, ranks)
        absorbed = given.q_nope_BTHN[..., None, :] @ weights.w_kc_HND[..., own]
        for head in range(HEADS):
            latent = given.latent_BSD[..., own]
            logits = scales[rank] * absorbed[:, :, head, 0] @ latent.mT
            logits = (logits + given.q_rope_BTHR[:, :, head] @ given.k_rope_BSR.mT) * SCALE
            later = torch.ones(7, 19, dtype=torch.bool).triu(13)
            read = logits.masked_fill(later, -torch.inf).softmax(-1) @ latent
            wanted[:, :, head] += read @ weights.w_vc_HDV[head, own]
    found = tpla_attention(given, weights, SCALE, ranks=ranks, logit_scales=scales)
    assert close(found, wanted, 1e-5)


def test_a_rank_reads_nothing_of_the_other_slices() -> None:
    weights = layer(gamma=False)
    given = rows(weights)
    other = rank_slice(DIM, 1, 2)
    spoiled = LatentRows(
        q_nope_BTHN=given.q_nope_BTHN,
        q_rope_BTHR=given.q_rope_BTHR,
        latent_BSD=given.latent_BSD.index_fill(-1, torch.arange(DIM)[other], torch.nan),
        k_rope_BSR=given.k_rope_BSR,
    )
    wanted = rank_attention(given, weights, SCALE, rank=0, ranks=2)
    assert torch.equal(rank_attention(spoiled, weights, SCALE, rank=0, ranks=2), wanted)


def test_one_rank_is_the_whole_model() -> None:
    weights = layer(gamma=False)
    given = rows(weights)
    wanted = unsliced_attention(given, weights, SCALE)
    assert torch.equal(tpla_attention(given, weights, SCALE, ranks=1), wanted)
    assert torch.equal(gla_attention(given, weights, SCALE, ranks=1), wanted)


def test_gla_drops_what_its_groups_do_not_read_and_tpla_does_not() -> None:
    """With latents of falling energy: GLA is the worst, the basis of principal directions the best."""
    weights = layer(0.3).folded()
    wanted = unsliced_attention(rows(weights), weights, SCALE)
    seen = statistics(weights)
    errors = {
        "gla": error(gla_attention(rows(weights), weights, SCALE, ranks=2), wanted),
    }
    for name in BASES:
        turned = weights.rotated(create_basis(name, DIM, seen))
        errors[name] = error(tpla_attention(rows(turned), turned, SCALE, ranks=2), wanted)
    assert errors["pca"] < errors["identity"] < errors["gla"]
    assert errors["output"] < errors["identity"]
    assert errors["pca"] < errors["hadamard"]


def test_scales_by_the_letter_amplify_noise() -> None:
    weights = layer(0.3).folded()
    wanted = unsliced_attention(rows(weights), weights, SCALE)
    seen = statistics(weights)
    basis = create_basis("pca", DIM, seen)
    turned = weights.rotated(basis)
    shares = energy_shares(seen.latent_DD, basis, 2)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] > 0.9
    plain = tpla_attention(rows(turned), turned, SCALE, ranks=2)
    literal = tpla_attention(
        rows(turned), turned, SCALE, ranks=2, logit_scales=literal_scales(shares)
    )
    assert error(plain, wanted) < error(literal, wanted)


def test_the_norm_of_slices_estimates_the_whole_norm_by_shares() -> None:
    """PCA and Hadamard estimate better than a basis whose shares vary from token to token."""
    weights = layer(0.3).folded()
    seen = statistics(weights)
    hidden = random(256, HIDDEN, seed=21)
    errors = {}
    for name in ("identity", "hadamard", "pca"):
        basis = create_basis(name, DIM, seen)
        latent = hidden @ weights.rotated(basis).down_DX.mT
        exact = exact_norm(latent, 1.0, EPS)
        assert close(exact, normed(layer(0.3, gamma=False), hidden) @ basis, 1e-5)
        sliced = sliced_norm(latent, 1.0, EPS, energy_shares(seen.latent_DD, basis, 2))
        errors[name] = error(sliced, exact)
    assert errors["pca"] < errors["identity"]
    whole = sliced_norm(latent, 1.0, EPS, (1.0,))
    assert torch.equal(whole, exact)


@pytest.mark.parametrize("dim", [1, 6, 24, 64, 192])
def test_hadamard_is_orthogonal_for_every_width_and_spreads_energy(dim: int) -> None:
    basis = create_basis("hadamard", dim)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(dim), rtol=0, atol=1e-5)
    assert torch.equal(basis, create_basis("hadamard", dim))
    assert (
        not torch.equal(basis.abs(), create_basis("hadamard", dim, seed=1).abs())
        or dim < 4
        or (dim & (dim - 1) == 0)
    )


def test_the_output_weighted_basis_leaves_out_what_nobody_reads() -> None:
    """Half of the latent has most of the energy but no weight: PCA takes it first, the weighted basis last."""
    loud = torch.diag(torch.cat([torch.full((12,), 100.0), torch.ones(12)]))
    read = torch.diag(torch.cat([torch.full((12,), 1e-6), torch.ones(12)]))
    seen = LatentStatistics(latent_DD=loud, weight_DD=read)
    first = create_basis("output", DIM, seen)[:, :12]
    assert float(first[:12].abs().max()) < 1e-2
    assert float(create_basis("pca", DIM, seen)[12:, :12].abs().max()) < 1e-5


@pytest.mark.parametrize("gamma", ["trained", "equal"])
def test_a_folded_norm_loses_nothing_in_half_precision(gamma: str) -> None:
    """What rounding it took off would be missing from every latent, and so from all logits and outputs alike."""
    weights = layer(gamma=gamma == "trained")
    half = (weights.gamma_D * 1.2345).bfloat16()
    folded = dataclasses.replace(weights, gamma_D=half).folded()
    assert torch.equal(folded.gamma_D.bfloat16().float(), folded.gamma_D)
    kept = folded.gamma_D.bfloat16().float() * folded.w_kc_HND
    torch.testing.assert_close(kept, half.float() * weights.w_kc_HND, rtol=1e-6, atol=0)
    if gamma == "equal":
        assert torch.equal(folded.w_kc_HND, weights.w_kc_HND)


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    weights = layer()
    with pytest.raises(ValueError, match="folded before"):
        weights.rotated(torch.eye(DIM))
    with pytest.raises(ValueError, match="not orthogonal"):
        weights.folded().rotated(2 * torch.eye(DIM))
    with pytest.raises(ValueError, match="cannot be cut into 5"):
        tpla_attention(rows(weights), weights, SCALE, ranks=5)
    with pytest.raises(ValueError, match="'svd' is not known"):
        create_basis("svd", DIM)
    with pytest.raises(ValueError, match="needs statistics"):
        create_basis("pca", DIM)
    with pytest.raises(ValueError, match="width 24 do not fit a latent of 32"):
        create_basis("pca", 32, statistics(weights.folded()))
    with pytest.raises(ValueError, match="24 wide in kv_a_proj, but 23"):
        LatentWeights(
            down_DX=weights.down_DX,
            gamma_D=weights.gamma_D[1:],
            w_kc_HND=weights.w_kc_HND,
            w_vc_HDV=weights.w_vc_HDV,
        )
    with pytest.raises(ValueError, match="zero in all"):
        LatentWeights(
            down_DX=weights.down_DX,
            gamma_D=torch.zeros(DIM),
            w_kc_HND=weights.w_kc_HND,
            w_vc_HDV=weights.w_vc_HDV,
        ).folded()
    with pytest.raises(ValueError, match="no token"):
        StatisticsSum(weights.folded(), random(HEADS, VALUE, HIDDEN)).result()
    with pytest.raises(ValueError, match="not square"):
        LatentStatistics(latent_DD=torch.eye(3), weight_DD=torch.eye(4))
