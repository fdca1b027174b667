"""Turns of conversations in the tiers below memory: real stores, folders and fetches, lives of an engine without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chunk_cache import RecordForm, StoreFolder, TextMarks, layout_named, tenant_mark
from rag_pipeline.notices import Notice, Reach
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.admission import fetching, queue_hints
from rag_pipeline.sglang_plugin.fusion.builds import notices_in_force, persistence
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.conversations import turn_table
from rag_pipeline.sglang_plugin.fusion.conversations import turns as turn_memory
from rag_pipeline.sglang_plugin.fusion.conversations.base import FinishedTurn
from rag_pipeline.sglang_plugin.fusion.conversations.lineage import Lineage
from rag_pipeline.sglang_plugin.fusion.conversations.turns import TurnMemory
from rag_pipeline.sglang_plugin.fusion.request.holdings import LeasedSpan
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import ATTRIBUTE, RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import ModelFacts
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

PREFIX, TURN = 8, 40
"""Tokens of the shared part and of a turn with its answer."""
ONE_TURN = 2500
"""Bytes that hold the record of one turn, and not those of two."""
ACME, GLOBEX = RadixNamespace(None, "acme"), RadixNamespace(None, "globex")


def whole(turns: int) -> list[int]:
    """Tokens of a conversation with so many turns."""
    return [*range(PREFIX), *(100 * turn + n for turn in range(1, turns + 1) for n in range(TURN))]


class Life:
    """One life of an engine over a folder; the KV of a token is its id."""

    def __init__(
        self, folder: Path, *, weights: str = "w", room: int = 1 << 20, **settings
    ) -> None:
        facts = ModelFacts(
            layers=(None,),
            num_q_heads=1,
            num_kv_heads=1,
            head_dim=2,
            scaling=1.0,
            rotary=None,
            layout=layout_named("heads"),
            fingerprint=weights,
            context_fields={
                "model_fingerprint": weights,
                "dtype": "float32",
                "kv_dtype": "float32",
                "rope": "{}",
            },
            qkv_share=0.1,
        )
        config = FusionConfig(store_dir=str(folder), store_bytes=room, **settings)
        self.runtime = FusionRuntime(config, facts)
        kv = torch.zeros(1, 1, 1, 2)
        self.runtime.record_form = RecordForm("heads", kv, kv)
        persistence.start_tiers(self.runtime, "no-model")

    def ask(
        self,
        turns: int,
        *,
        tenant: RadixNamespace = ACME,
        fused: bool = False,
        radix_len: int = 0,
        **fusion,
    ) -> RequestState:
        """Serve a prompt of so many turns, and keep what it leaves; the state holds what it had leased."""
        state = self.admitted(turns, tenant=tenant, radix_len=radix_len, **fusion)
        state.report.runs = [[1, 1]] if fused else []
        if fused:
            # As behind a chunk that was computed elsewhere.
            state._found.approximate_from, state._found.approximations = PREFIX, (("chunk",),)
        ids = np.array(whole(turns))
        kv = torch.tensor(ids, dtype=torch.float32).repeat(2, 1).T[:, None]
        pool = SimpleNamespace(get_key_buffer=lambda i: kv, get_value_buffer=lambda i: kv)
        slots = torch.arange(ids.size)
        self.loaded = [(s.start, s.end, s.is_exact) for s in state.spans]
        for span in state.spans:
            keys = span.lease.record.layer(0).k[span.match.chunk_offset :][: span.end - span.start]
            assert keys[:, 0, 0].tolist() == ids[span.start : span.end].tolist()
        state.finish(state.prompt.size)
        self.runtime.conversations.keep(
            FinishedTurn(state=state, tenant=tenant, ids=ids, pool=pool, slots=slots)
        )
        return state

    def waiting(self, turns: int, *, tenant: RadixNamespace = ACME, **fusion) -> SimpleNamespace:
        """A request that has come."""
        request = FusionRequest(prefix_len=PREFIX, conversation="c", policy="reuse", **fusion)
        state = RequestState(request, request.make_policy("reuse"), whole(turns), explicit=True)
        req = SimpleNamespace(rid="r", **tenant._asdict(), **{ATTRIBUTE: state})
        fetching.expect(self.runtime, req, state)
        return req

    def admitted(
        self, turns: int, *, tenant: RadixNamespace, radix_len: int, **fusion
    ) -> RequestState:
        state = getattr(self.waiting(turns, tenant=tenant, **fusion), ATTRIBUTE)
        assert self.runtime.fetcher is None or self.runtime.fetcher.drain(60)
        state.begin_attempt(radix_len, self.runtime.epoch)
        self.runtime.conversations.lease(state, tenant)
        state.resolve()
        return state

    def end(self) -> None:
        assert self.runtime.fetcher.close(60)
        assert self.runtime.tiers.close(60)
        self.runtime.store.check_integrity(expect_idle=True)

    def counts(self) -> dict[str, int]:
        return self.runtime.metrics.to_json()


@pytest.fixture
def lives(tmp_path: Path):
    begun = []

    def begin(**options) -> Life:
        begun.append(Life(tmp_path / "kv", **options))
        return begun[-1]

    yield begin
    for life in begun:
        if life.runtime.fetcher is not None:
            life.runtime.fetcher.close(60)
            life.runtime.tiers.close(60)


EACH = [(PREFIX + TURN * n, PREFIX + TURN * (n + 1), True) for n in range(4)]


@pytest.mark.parametrize("room", [1 << 20, ONE_TURN], ids=["all fits", "one turn fits"])
def test_a_conversation_goes_on_after_a_restart(lives, room):
    one = lives()
    for turns in (1, 2, 3):
        one.ask(turns)
    one.end()
    assert one.counts()["disk.written"] == 3
    two = lives(room=room)
    assert two.counts()["turns.restored"] == 3
    state = two.ask(4, radix_len=PREFIX)
    if room > ONE_TURN:
        assert two.loaded == EACH[:3]
        # All in front of the new turn is exact, so the turn is, and another life goes on from it.
        assert state.approximate_from is None
        two.end()
        three = lives()
        three.ask(5)
        assert three.loaded == EACH
    else:
        assert len(two.loaded) == 1  # no more has room at once


def test_turns_that_memory_has_no_room_for_are_fetched_when_their_request_comes(lives):
    one = lives()
    for turns in (1, 2):
        one.ask(turns)
    one.end()
    two = lives()
    store = two.runtime.store
    for key in store.keys():  # noqa: SIM118 - no mapping
        assert store.evict(key)
    req = two.waiting(3)
    assert two.runtime.fetcher.drain(60)
    assert len(store.keys()) == 2
    assert two.counts()["disk.fetched"] == 2
    assert [len(row) for row in getattr(req, ATTRIBUTE).wanted] == [1, 1]
    two.ask(3)
    assert two.loaded == EACH[:2]
    assert two.counts()["disk.fetched"] == 2  # they were there already


def test_the_queue_says_when_turns_are_fetched(lives):
    one = lives()
    for turns in (1, 2):
        one.ask(turns)
    one.end()
    two = lives(eviction="lookahead")
    for key in two.runtime.store.keys():  # noqa: SIM118 - no mapping
        assert two.runtime.store.evict(key)
    req = two.waiting(3)
    assert two.runtime.fetcher.pending == 0
    queue_hints.note_queue(two.runtime, [req])
    assert two.runtime.fetcher.drain(60)
    assert len(two.runtime.store.keys()) == 2
    assert two.counts()["tiers.fetched_ahead"] == 2


def test_later_turns_are_used_without_an_earlier_one_which_is_kept_anew(lives):
    one = lives()
    for turns in (1, 2, 3):
        one.ask(turns)
    one.end()
    folder = StoreFolder(Path(one.runtime.config.store_dir))
    (first,) = [key for key in folder.keys() if folder.token_ids(key)[0] == 100]  # noqa: SIM118
    assert folder.remove(first)
    two = lives()
    two.ask(4)
    assert two.loaded == EACH[1:3]
    two.end()
    three = lives()
    three.ask(5)
    assert three.loaded == EACH
    assert folder.contains(first)


def test_a_file_that_is_damaged_or_gone_is_a_gap(lives):
    one = lives()
    for turns in (1, 2, 3):
        one.ask(turns)
    one.end()
    two = lives()
    for key in two.runtime.store.keys():  # noqa: SIM118 - no mapping
        assert two.runtime.store.evict(key)
    paths = sorted(Path(two.runtime.config.store_dir).rglob("*.safetensors"))
    data = bytearray(paths[0].read_bytes())
    data[-3] ^= 1
    paths[0].write_bytes(data)
    paths[1].unlink()
    two.ask(4)
    assert len(two.loaded) == 1
    two.ask(4)
    # What was missing was kept anew; two turns that touch are one record then.
    held = [n for start, end, is_exact in two.loaded for n in range(start, end) if is_exact]
    assert held == [*range(PREFIX, PREFIX + 4 * TURN)]


def test_a_name_that_a_client_gives_to_many_chats_serves_the_latest_of_them(lives, monkeypatch):
    monkeypatch.setattr(turn_table, "MAX_TURNS", 4)
    monkeypatch.setattr(turn_memory, "MAX_TURNS", 4)
    one = lives()
    shared = whole

    def chat(number: int) -> None:
        monkeypatch.setitem(
            globals(), "whole", lambda n: [t + 10_000 * number * (t >= PREFIX) for t in shared(n)]
        )

    for number in range(9):
        chat(number)
        one.ask(1)
        one.ask(2)
        assert one.loaded == EACH[:1]
    one.ask(5)
    assert one.loaded == EACH[:2]
    one.ask(6)  # full of this chat alone: its first turns stay
    assert [start for start, _, _ in one.loaded] == [PREFIX, PREFIX + TURN, PREFIX + 2 * TURN]
    one.end()
    two = lives()
    (held,) = two.runtime.conversations.table._spaces.values()
    assert len(held) == two.counts()["turns.restored"] == 4


def test_fused_turns_survive_too_and_never_pass_for_exact(lives):
    one = lives()
    one.ask(1, fused=True)
    state = one.ask(2, radix_len=PREFIX)
    assert one.loaded == [(*EACH[0][:2], False)]
    assert state.approximate_from == PREFIX
    one.end()
    two = lives()
    two.ask(3, radix_len=PREFIX)
    assert two.loaded == [(*run[:2], False) for run in EACH[:2]]
    two.end()
    folder = StoreFolder(Path(one.runtime.config.store_dir))
    lineages = [
        Lineage.decode(folder.describe(key.namespace)["prefix_digest"])
        for key in folder.keys()  # noqa: SIM118 - no mapping
    ]
    assert [lineage.is_exact for lineage in lineages] == [False] * 3
    assert len({lineage.through for lineage in lineages}) >= 2
    # The chain is broken where its first turn is gone: what stands behind was computed over it.
    (first,) = [key for key in folder.keys() if folder.token_ids(key)[0] == 100]  # noqa: SIM118
    assert folder.remove(first)
    three = lives()
    three.ask(4, radix_len=PREFIX)
    assert three.loaded == []


def test_other_tenants_conversations_policies_and_weights_find_nothing(lives):
    one = lives()
    for turns in (1, 2):
        one.ask(turns)
    one.end()
    two = lives()
    for tenant, fusion in (
        (GLOBEX, {}),
        (RadixNamespace(None, None), {}),
        (RadixNamespace("acme", None), {}),
        (ACME, {"passage": False}),
    ):
        state = two.admitted(3, tenant=tenant, radix_len=0, **fusion)
        assert state.spans == ()
    two.end()
    other = lives(weights="others")
    assert other.counts().get("turns.restored", 0) == 0
    other.ask(3)
    assert other.loaded == []


def test_turns_that_went_through_a_lossy_codec_are_approximate_from_then_on(lives):
    one = lives(store_codec="kivi8")
    for turns in (1, 2):
        one.ask(turns)
    one.end()
    two = lives()
    state = two.admitted(3, tenant=ACME, radix_len=PREFIX)
    assert [span.is_exact for span in state.spans] == [False, False]
    assert state.approximate_from == PREFIX
    state.drop()


def test_what_one_tenant_erases_takes_its_turns_from_memory_and_from_the_disk(lives, monkeypatch):
    one = lives()
    for tenant in (ACME, GLOBEX):
        for turns in (1, 2):
            one.ask(turns, tenant=tenant)
    assert one.runtime.tiers.drain(60)
    folder = StoreFolder(Path(one.runtime.config.store_dir))
    assert len(set(folder.keys())) == len(one.runtime.store.keys()) == 4
    # One of the turns is below memory only.
    gone = next(k for k in one.runtime.store.keys() if one.runtime.store.tenant_of(k) == ACME.owner)  # noqa: SIM118
    assert one.runtime.store.evict(gone)
    reach = Reach(tenant=tenant_mark("acme"), spared=frozenset({tenant_mark("globex")}))
    notice = Notice(name="n", marks=TextMarks({}, everything=True), folders=(), reach=reach)
    monkeypatch.setattr(notices_in_force, "notices", lambda seen, **_: iter([notice]))
    one.runtime.erased.look()
    left = {one.runtime.store.tenant_of(key) for key in one.runtime.store.keys()}  # noqa: SIM118
    assert left == {GLOBEX.owner}
    assert {folder.tenant_of(key.namespace) for key in folder.keys()} == {GLOBEX.owner}  # noqa: SIM118
    table = one.runtime.conversations.table
    assert [tenant for tenant, _, turns in table._spaces.items() if turns] == [GLOBEX.owner]
    one.ask(3, tenant=GLOBEX)
    assert one.loaded == EACH[:2]
    one.ask(3)
    assert one.loaded == []


def test_a_memory_that_cannot_restore_costs_its_turns_and_not_the_tier(lives, monkeypatch):
    one = lives()
    one.ask(1)
    one.end()
    monkeypatch.setattr(TurnMemory, "restore", lambda *_: 1 / 0)
    two = lives()
    assert two.runtime.tiers is not None
    assert two.counts()["disk.loaded"] == 1
    two.ask(2)
    assert two.loaded == []


def test_a_span_that_a_policy_may_touch_makes_a_turn_approximate():
    request = FusionRequest(prefix_len=0, conversation="c")
    state = RequestState(request, request.make_policy("reuse"), range(50), explicit=True)
    lease = SimpleNamespace(
        release=lambda: None, record=SimpleNamespace(base_position=0, codec="plain")
    )
    for is_turn, is_exact in ((True, False), (False, True), (False, False)):
        state.begin_attempt(0, 0)
        match = SimpleNamespace(prompt_start=4, prompt_end=9, chunk_offset=0)
        state.lease([LeasedSpan(match=match, lease=lease, is_turn=is_turn, is_exact=is_exact)])
        state.resolve()
        assert state.approximate_from == 4
        assert state.approximations
