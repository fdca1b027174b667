"""Trees of drafted tokens: read from masks, walked, sampled from, and attended over."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rag_kernels.attention.torch_sdpa import decode_attention, extend_attention, tree_attention
from rag_pipeline.sglang_plugin.cpu.draft_trees import (
    keep_top_k,
    keep_top_p,
    read_tree,
    sample_tree,
    verify_tree,
)
from rag_pipeline.sglang_plugin.cpu.speculation import (
    accepted_slots,
    assign_slots,
    cache_locs,
    front_slots,
)

PARENTS = ([-1, 0, 0, 1, 1, 3], [-1, 0, 1, 2, 3, 4], [-1, 0, 0, 0, 0, 0], [-1, 0, 1, 0, 3, 1])
"""Parent of each node: a bushy tree, a chain, a star, and one whose siblings are apart."""


def _paths(parents: list[int]) -> list[list[int]]:
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*([] if parent < 0 else paths[parent]), node])
    return paths


def _mask(parents: list[int]) -> torch.Tensor:
    mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node, path in enumerate(_paths(parents)):
        mask[node, path] = True
    return mask


def _read(trees: list[list[int]], lengths: list[int]) -> tuple[torch.Tensor, ...]:
    n, size = len(trees[0]), len(trees)
    out = [torch.empty(size * n, dtype=torch.int64)]
    out += [torch.empty(size, n, dtype=torch.int64) for _ in range(3)]
    masks = torch.stack([_mask(parents) for parents in trees])
    read_tree(masks.flatten(), torch.tensor(lengths), *out, size, n)
    return tuple(out)


def test_a_tree_is_read_as_sglang_reads_it() -> None:
    """Its worker derives the same links on the host for grammars."""
    from rag_pipeline.sglang_plugin.cpu.speculation import install

    install()
    from sglang.srt.speculative.ngram_worker import _derive_tree_links

    trees = [list(parents) for parents in PARENTS]
    positions, index, child, sibling = _read(trees, [5, 17, 1, 100])
    masks = np.stack([_mask(parents).numpy() for parents in trees])
    wanted_child, wanted_sibling = _derive_tree_links(masks, len(trees), 6)
    assert torch.equal(child, wanted_child)
    assert torch.equal(sibling, wanted_sibling)
    assert index.flatten().tolist() == list(range(24))
    depths = [len(path) - 1 for parents in trees for path in _paths(parents)]
    starts = [start for start in (5, 17, 1, 100) for _ in range(6)]
    assert positions.tolist() == [a + b for a, b in zip(starts, depths, strict=True)]


@pytest.mark.parametrize("parents", PARENTS)
def test_the_longest_path_that_the_model_agrees_with_is_accepted(parents: list[int]) -> None:
    """Siblings have different tokens, as in SGLang's trie."""
    order = [sum(p == parents[node] for p in parents[:node]) for node in range(6)]
    _, index, child, sibling = _read([parents], [9])
    for wanted in itertools.product(range(3), repeat=6):
        predicts = torch.zeros(6, dtype=torch.int32)
        accepted = torch.full((1, 6), -1, dtype=torch.int32)
        count = torch.empty(1, dtype=torch.int32)
        tokens, want = torch.tensor([order]), torch.tensor([wanted])
        verify_tree(predicts, accepted, count, tokens, index, child, sibling, want)
        agreed = [
            path
            for path in _paths(list(parents))
            if all(wanted[above] == order[node] for above, node in itertools.pairwise(path))
        ]
        path = max(agreed, key=len)
        assert accepted[0, : len(path)].tolist() == path
        assert (accepted[0, len(path) :] == -1).all()
        assert int(count) == len(path) - 1
        assert predicts[path].tolist() == [wanted[node] for node in path]


def test_sampled_answers_have_the_distribution_of_sampling_one_by_one() -> None:
    """Two tokens, drawn 4,000 times: every pair as often as the product of its probabilities, whatever was drafted."""
    generator = torch.Generator().manual_seed(3)
    size, parents, tokens = 4000, [-1, 0, 0, 1], [0, 0, 2, 1]
    first = torch.tensor([0.5, 0.2, 0.3])
    second = torch.tensor([[0.1, 0.6, 0.3], [0.4, 0.4, 0.2], [0.7, 0.2, 0.1]])
    probs = torch.stack([first, second[0], second[2], torch.tensor([1.0, 0.0, 0.0])])
    _, index, child, sibling = _read([parents] * size, [9] * size)
    predicts = torch.zeros(size * 4, dtype=torch.int32)
    accepted = torch.full((size, 4), -1, dtype=torch.int32)
    count = torch.empty(size, dtype=torch.int32)
    sample_tree(
        predicts=predicts,
        accept_index=accepted,
        accept_token_num=count,
        candidates=torch.tensor([tokens] * size),
        retrive_index=index,
        retrive_next_token=child,
        retrive_next_sibling=sibling,
        uniform_samples=torch.rand(size, 4, generator=generator),
        target_probs=probs.expand(size, 4, 3),
        threshold_single=1.0,
    )
    pairs = torch.zeros(3, 3)
    for row, taken in enumerate(count.tolist()):
        one = int(predicts[row * 4])
        if taken:
            pairs[one, int(predicts[int(accepted[row, 1])])] += 1 / size
        else:
            assert one == 1  # the only token that was not drafted
            pairs[1] += second[1] / size
    torch.testing.assert_close(pairs, first[:, None] * second, rtol=0, atol=0.03)


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.25, 0.05, 0.6, 0.1]])
    kept = keep_top_k(probs, torch.tensor([2, 4]))
    torch.testing.assert_close(kept[0], torch.tensor([0, 4 / 7, 3 / 7, 0]))
    torch.testing.assert_close(kept[1], probs[1])
    kept = keep_top_p(probs, torch.tensor([0.75, 0.5]))
    torch.testing.assert_close(kept[0], torch.tensor([0, 4 / 9, 3 / 9, 2 / 9]))
    torch.testing.assert_close(kept[1], torch.tensor([0, 0, 1.0, 0]))


def test_slots_of_drafts_are_found_written_and_packed() -> None:
    table = torch.zeros(3, 8, dtype=torch.int32)
    rows, start, end = torch.tensor([2, 0]), torch.tensor([3, 1]), torch.tensor([6, 4])
    assign_slots(rows, table, start, end, torch.tensor([11, 12, 13, 21, 22, 23]), 2)
    assert table[2].tolist() == [0, 0, 0, 11, 12, 13, 0, 0]
    slots = cache_locs(
        req_pool_indices=rows,
        req_to_token=table,
        start_offset=start,
        end_offset=end,
        batch_size=2,
        draft_token_num=3,
        device="cpu",
    )
    assert slots.tolist() == [11, 12, 13, 21, 22, 23]
    front, taken = torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    front_slots(torch.tensor([2, 1]), slots, front)
    accepted_slots(torch.tensor([[0, 2, -1], [3, -1, -1]]), slots, taken, 6)
    assert front.tolist() == [11, 12, 21, 0, 0, 0]
    assert taken.tolist() == [11, 13, 21, 0, 0, 0]


@pytest.mark.parametrize("parents", PARENTS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_a_node_attends_as_the_last_token_of_its_own_path(
    parents: list[int], heads: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(count: int, num: int) -> torch.Tensor:
        return torch.randn(count, num, 16, generator=generator)

    before, n = 19, len(parents)
    q, k, v = draw(n, heads[0]), draw(before + n, heads[1]), draw(before + n, heads[1])
    out = tree_attention(q, k, v, _mask(parents), scale=0.25)
    for node, path in enumerate(_paths(list(parents))):
        at = torch.tensor([*range(before), *(before + step for step in path)])
        alone = decode_attention(q[node][None], k[at][None], v[at][None], scale=0.25)[0]
        torch.testing.assert_close(out[node], alone, rtol=1e-5, atol=1e-6)


def test_a_chain_is_what_extend_computes() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(count, 2, 8, generator=generator) for count in (5, 12, 12))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    out = tree_attention(q, k, v, mask, scale=0.5)
    torch.testing.assert_close(out, extend_attention(q, k, v, scale=0.5), rtol=1e-5, atol=1e-6)


def test_keys_and_values_of_accepted_drafts_move_to_the_front_of_their_window() -> None:
    """SGLang's own mover and pool, with the functions that are put into them."""
    from types import SimpleNamespace

    from rag_pipeline.sglang_plugin.cpu.speculation import install

    install()
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.speculative.spec_utils import move_accept_tokens_to_target_kvcache

    pool = MHATokenToKVPool(
        size=32,
        page_size=1,
        dtype=torch.float32,
        head_num=2,
        head_dim=4,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
        enable_kv_cache_copy=True,
    )
    buffers = [*pool.k_buffer, *pool.v_buffer]
    for number, buffer in enumerate(buffers):
        buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape) + 1000 * number)
    before = [buffer.clone() for buffer in buffers]
    slots = torch.tensor([11, 12, 13, 14, 25, 24, 23, 22])  # two requests, four nodes each
    accepted = torch.tensor([[0, 2, 3, -1], [4, -1, -1, -1]], dtype=torch.int32)
    move_accept_tokens_to_target_kvcache(
        SimpleNamespace(seq_lens=torch.tensor([7, 9]), out_cache_loc=slots),
        accepted,
        torch.tensor([2, 0], dtype=torch.int32),
        SimpleNamespace(get_kvcache=lambda: pool),
    )
    for buffer, old in zip(buffers, before, strict=True):
        wanted = old.clone()
        wanted[12], wanted[13] = old[13], old[14]
        assert torch.equal(buffer, wanted)
