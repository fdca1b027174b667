"""One rank's scheduler, reduced to what fusion can notice: matching, refusals, pieces, publication, release."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from chunk_cache import MemoryStore, hash_token_ids, layout_named
from chunk_cache.matching import ChunkMatcher
from fusion_world import checks, model
from fusion_world.requests import Adder, Req
from fusion_world.tree import Tree
from rag_pipeline.sglang_plugin.fusion.admission import admit as admission
from rag_pipeline.sglang_plugin.fusion.admission import prefill_adder as batching
from rag_pipeline.sglang_plugin.fusion.admission import radix_tree as radix
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.conversations.turns import TurnMemory
from rag_pipeline.sglang_plugin.fusion.forward import model_forward as forward
from rag_pipeline.sglang_plugin.fusion.forward.layer_pass import find_pass
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState, state_of
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import ModelFacts
from rag_pipeline.sglang_plugin.fusion.runtime.rank_group import RankGroup
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

MAX_REQUESTS, MAX_LENGTH, SLOTS = 8, 320, 2400
PASSAGE = tuple(5 + (7 * i) % 31 for i in range(9))
LEAST = 6
"""Fewest tokens that are loaded, or found in a prompt."""


class Server:
    """A rank.

    Parameters
    ----------
    group : RankGroup, optional
        Of this rank.
    rank, size : int
        Its place in the group.
    memory : type
        Conversation memory.
    """

    def __init__(
        self,
        group: RankGroup | None = None,
        rank: int = 0,
        size: int = 1,
        memory: type[TurnMemory] = TurnMemory,
    ) -> None:
        self.epoch = 0
        self.pool = model.Pool(SLOTS)
        self.tree = Tree(list(range(1, SLOTS)))
        self.table = torch.zeros(MAX_REQUESTS, MAX_LENGTH, dtype=torch.int32)
        self.rows = list(range(MAX_REQUESTS))
        self.waiting_queue: list[Req] = []
        self.running: list[Req] = []
        self.cut: Req | None = None
        self.trace: list[Any] = []
        self.known: dict[Any, checks.Made] = {}
        self.seen: list[Any] = []
        self.proven: set[Any] = set()
        self.fails_at: int | None = None
        self.broken: AssertionError | None = None
        facts = ModelFacts(
            layers=model.layer_modules(),
            num_q_heads=model.Q_HEADS,
            num_kv_heads=model.KV_HEADS,
            head_dim=model.DIM,
            scaling=model.DIM**-0.5,
            rotary=model.SPEC,
            layout=layout_named("heads"),
            fingerprint="epoch-0",
            context_fields={
                "model_fingerprint": "epoch-0",
                "dtype": "float32",
                "kv_dtype": "float32",
                "rope": "{}",
                "settings": "none",
                "tp_rank": rank,
                "tp_size": size,
            },
            qkv_share=0.3,
        )
        config = FusionConfig(min_reused_tokens=LEAST, automatic=True, self_check=False)
        self.runtime = FusionRuntime(config, facts, group=group)
        self.runtime.store = MemoryStore(
            4 << 20, matcher=ChunkMatcher(min_match=LEAST, min_piece=LEAST)
        )
        self.runtime.conversations = memory(self.runtime)
        self.kept: dict[int, tuple[int, ...]] = {}
        """All tokens up to the end of a turn, by its number."""
        self._note_turns(self.runtime.conversations)
        self.runtime.max_prompt = MAX_LENGTH - 20
        self.runtime.passage = torch.tensor(PASSAGE).numpy()
        allocator = SimpleNamespace(
            page_size=1,
            get_all_free_pages=lambda: torch.tensor(self.tree.free, dtype=torch.int64),
            get_kvcache=lambda: self.pool,
        )
        self.tree.req_to_token_pool = SimpleNamespace(req_to_token=self.table)
        self.tree.token_to_kv_pool_allocator = allocator
        self.runner = SimpleNamespace(
            req_to_token_pool=self.tree.req_to_token_pool,
            token_to_kv_pool=self.pool,
            token_to_kv_pool_allocator=allocator,
            model_config=SimpleNamespace(context_len=MAX_LENGTH),
            lora_manager=None,
            _forward_raw=lambda view, _: self._compute(self.runner, view),
        )

    def _note_turns(self, memory: TurnMemory) -> None:
        keep = memory.keep

        def noted(turn: Any) -> bool:
            kept = keep(turn)
            ids = tuple(turn.ids.tolist())
            for held in memory.table._spaces.values():
                for one in held:
                    same = ids[one.start : one.end] == tuple(one.ids.tolist())
                    if same and hash_token_ids(ids[: one.start]) == one.before:
                        self.kept.setdefault(one.number, ids[: one.end])
            return kept

        memory.keep = noted  # type: ignore[method-assign]

    # -- what SGLang does ------------------------------------------------------------------------

    def submit(
        self, rid: str, ids: Sequence[int], tenant: RadixNamespace, fusion: dict[str, Any] | None
    ) -> None:
        """Queue a request."""
        req = Req(rid, ids, tenant, fusion)
        admission.after_req_init(None, req)
        self.waiting_queue.append(req)

    def handle_generate_request(self, wanted: Any) -> None:
        """Queue a request that fusion makes for itself."""
        custom = wanted.sampling_params.custom_params
        fusion = {key.removeprefix("rag_"): value for key, value in custom.items()}
        self.submit(
            wanted.rid,
            wanted.input_ids,
            RadixNamespace(wanted.extra_key, wanted.cache_salt),
            fusion,
        )

    def is_fully_idle(self) -> bool:
        """Whether nothing is queued or running."""
        return not (self.waiting_queue or self.running or self.cut)

    def turn(self, rows: int, refusals: Sequence[bool]) -> None:
        """Admit what fits into ``rows`` computed rows and run it."""
        adder = Adder(rows, refusals)
        if self.cut is not None:
            req, self.cut = self.cut, None
            batching.around_add_chunked_req(self._add_piece, adder, req)
            if req not in adder.can_run_list:
                self.cut = req
                return
        for req in list(self.waiting_queue):
            if adder.has_cut or not self.rows:
                break
            path = self._match(req)
            req.prefix_len = req.kv.cache_protected_len = len(path)
            self.tree.lock(path, 1)
            batching.around_add_one_req(self._add, adder, req)
            if req in adder.can_run_list:
                req.path = path
                self.waiting_queue.remove(req)
                req.kv.req_pool_idx = self.rows.pop()
                slots = torch.tensor([node.slot for node in path], dtype=torch.int32)
                self.table[req.kv.req_pool_idx, : len(path)] = slots
            else:
                self.tree.lock(path, -1)
        if adder.can_run_list:
            self._run(adder.can_run_list)

    def decode(self, req: Req, tokens: Sequence[int]) -> None:
        """Compute answer tokens one by one."""
        for token in tokens:
            if not self.tree.free or len(req.full_untruncated_fill_ids) >= MAX_LENGTH - 1:
                return
            self._extend_row(req, 1)
            last = req.full_untruncated_fill_ids[-1]
            batch = _batch([req], [last], [req.held - 1], [req.held], self.table)
            self._compute(self.runner, batch)
            req.output_ids.append(token)
            req.full_untruncated_fill_ids = req.origin_input_ids + array("q", req.output_ids)

    def finish(self, req: Req, *, reason: Any = None, publishes: bool = True) -> None:
        """End a running request; ``reason`` for one that was aborted."""
        req.is_finished, req.finished_reason = True, reason
        if publishes:
            radix.around_checkpoint(self._checkpoint, self.tree, req, up_to=req.held)
        self._release(req)

    def retract(self, req: Req) -> None:
        """Take a request's KV away and queue it again."""
        self._release(req)
        req.prefix_len = req.kv.cache_protected_len = req.extend_end = 0
        req.approximate_from = None
        self.waiting_queue.insert(0, req)

    def new_weights(self) -> None:
        """Other weights: nothing in flight, the tree empty."""
        for req in [*self.running, *([self.cut] if self.cut else [])]:
            self.retract(req)
        self.tree.evict(0)
        assert not self.tree.slots()
        self.epoch += 1
        self.runtime.new_weights(in_update=False, tree_is_old=False)

    # -- inside ----------------------------------------------------------------------------------

    def _match(self, req: Req) -> list[Any]:
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        ids, limit = req.full_untruncated_fill_ids, len(req.full_untruncated_fill_ids) - 1
        key = RadixKey(ids, req.extra_key, limit=limit, cache_salt=req.cache_salt)
        params = MatchPrefixParams(key=key, req=req)  # type: ignore[arg-type]
        found: list[Any] = radix.around_match_prefix(Tree.match_prefix, self.tree, params).path
        return found

    def _add(self, adder: Adder, req: Req) -> None:
        if adder.refusals and adder.refusals.pop(0):
            return
        rest = len(req.full_untruncated_fill_ids) - req.prefix_len
        count = min(rest, adder.rem_chunk_tokens)
        if count > 0 and count + 8 <= len(self.tree.free):
            self._admit(adder, req, count, rest)

    def _add_piece(self, adder: Adder, req: Req) -> None:
        rest = len(req.full_untruncated_fill_ids) - req.prefix_len
        count = min(rest, max(1, adder.rem_chunk_tokens))
        if count + 8 <= len(self.tree.free):
            self._admit(adder, req, count, rest)

    def _admit(self, adder: Adder, req: Req, count: int, rest: int) -> None:
        req.extend_end = req.prefix_len + count
        adder.can_run_list.append(req)
        adder.rem_chunk_tokens -= count
        adder.rem_input_tokens -= count
        adder.has_cut = adder.has_cut or count < rest

    def _extend_row(self, req: Req, count: int) -> None:
        slots = [self.tree.free.pop(0) for _ in range(count)]
        self.table[req.kv.req_pool_idx, req.extend_end : req.extend_end + count] = torch.tensor(
            slots, dtype=torch.int32
        )
        req.extend_end += count

    def _run(self, reqs: list[Req]) -> None:
        for req in reqs:
            end, req.extend_end = req.extend_end, req.prefix_len
            self._extend_row(req, end - req.prefix_len)
        ids = [t for r in reqs for t in r.full_untruncated_fill_ids[r.prefix_len : r.extend_end]]
        batch = _batch(
            reqs, ids, [r.prefix_len for r in reqs], [r.extend_end for r in reqs], self.table
        )
        forward.after_init_new(batch, None, SimpleNamespace(reqs=reqs), self.runner)
        plans = [checks.Plan.of(self, req) for req in reqs]
        guarded = checks.Guard(self, reqs)
        self.seen = []
        forward.around_model_forward(self._compute, self.runner, batch)
        if self.broken is not None:
            raise self.broken
        guarded.check()
        # The guard is the last of several: nothing should ever come to it.
        assert not self.runtime.metrics.to_json().get("fallbacks.protected_write"), "the guard held"
        for plan in plans:
            plan.check()
        self.trace.append(self.seen)
        for req in reqs:
            up_to = req.extend_end
            is_last = up_to == len(req.full_untruncated_fill_ids)
            radix.around_checkpoint(self._checkpoint, self.tree, req, up_to=up_to)
            req.prefix_len = up_to
            if is_last:
                self.running.append(req)
                req.output_ids.append(3 + len(req.output_ids))
                req.full_untruncated_fill_ids = req.origin_input_ids + array("q", req.output_ids)
            else:
                self.cut = req

    def _compute(self, runner: Any, batch: Any) -> Any:
        try:
            checks.writes_nothing_protected(self, batch)
        except AssertionError as error:
            # Fusion takes whatever is raised here for a fault of its own, and goes on.
            self.broken = error
            raise
        self.seen.append([batch.positions.tolist(), batch.extend_seq_lens_cpu])
        fails_at = None
        if find_pass(batch) is not None:
            fails_at, self.fails_at = self.fails_at, None
        return model.compute(self.epoch, self.pool, self.table, batch, fails_at=fails_at)

    def _checkpoint(self, tree: Tree, req: Req, *, up_to: int) -> None:
        if up_to <= req.kv.cache_protected_len:
            return
        ids = req.full_untruncated_fill_ids[:up_to]
        row = self.table[req.kv.req_pool_idx, :up_to]
        kept = tree.insert(req.tenant, ids, row.tolist())
        self.table[req.kv.req_pool_idx, :up_to] = torch.tensor(kept, dtype=torch.int32)
        tree.lock(req.path, -1)
        req.path = tree.path(req.tenant, ids)
        tree.lock(req.path, 1)
        req.kv.cache_protected_len = up_to

    def _release(self, req: Req) -> None:
        own = self.table[req.kv.req_pool_idx, req.kv.cache_protected_len : req.held]
        self.tree.free += own.tolist()
        self.tree.lock(req.path, -1)
        req.path = []
        self.rows.append(req.kv.req_pool_idx)
        req.kv.req_pool_idx = None
        if req in self.running:
            self.running.remove(req)
        if req is self.cut:
            self.cut = None
        admission.after_release(None, req)


def _batch(
    reqs: Sequence[Req],
    ids: Sequence[int],
    starts: Sequence[int],
    ends: Sequence[int],
    table: torch.Tensor,
) -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    rows = torch.tensor([req.kv.req_pool_idx for req in reqs])
    spans = list(zip(rows.tolist(), starts, ends, strict=True))
    lens = torch.tensor(counts, dtype=torch.int32)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(reqs),
        input_ids=torch.tensor(list(ids), dtype=torch.int64),
        req_pool_indices=rows,
        seq_lens=torch.tensor(ends),
        seq_lens_cpu=torch.tensor(ends),
        seq_lens_sum=sum(ends),
        out_cache_loc=torch.cat([table[row, lo:hi] for row, lo, hi in spans]).long(),
        positions=torch.cat([torch.arange(lo, hi) for _, lo, hi in spans]),
        extend_num_tokens=sum(counts),
        extend_seq_lens=lens,
        extend_seq_lens_cpu=counts,
        extend_prefix_lens=torch.tensor(starts, dtype=torch.int32),
        extend_prefix_lens_cpu=list(starts),
        extend_start_loc=lens.cumsum(0, dtype=torch.int32) - lens,
        rids=[req.rid for req in reqs],
    )


def states(reqs: Sequence[Req]) -> list[RequestState]:
    """Fusion's states of requests that have one."""
    return [state for req in reqs if (state := state_of(req)) is not None]
