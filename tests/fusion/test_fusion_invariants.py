"""Whatever lies in the store and in whatever order requests come: nothing that is called exact is approximate.

Random requests, pieces, refusals, aborts, retractions, evictions, faults and weight updates run through the real code
of fusion over a plain model (``tests/support/fusion_world``). After every forward the checks of its ``checks`` module
compare keys and values with fp64 prefill of the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fusion_world import checks
from fusion_world.ranks import Ranks, all_gather_object, all_reduce
from fusion_world.recipes import TENANTS, Fields, builds, draw_request, draw_tenant
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rag_pipeline.sglang_plugin.fusion.builds import idle as background
from rag_pipeline.sglang_plugin.fusion.conversations.cached_attention import CachedAttentionMemory
from rag_pipeline.sglang_plugin.fusion.conversations.turns import TurnMemory
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace

DISTURBANCES = (
    "tree evicted",
    "tree evicted",
    "chunk evicted",
    "chunk lost on one rank",
    "chunk lost on one rank",
    "fault",
    "new weights",
)


@st.composite
def requests(draw: Any) -> tuple[list[int], Any, Any]:
    """Token ids, fields of fusion and tenant."""

    def choose(options: Sequence[Any]) -> Any:
        return options[draw(st.integers(0, len(options) - 1))]

    return *draw_request(choose), draw_tenant(choose)


class Machine(RuleBasedStateMachine):
    """Steps in any order; every rank takes each of them."""

    size = 1
    memory: type[TurnMemory] = TurnMemory

    def __init__(self) -> None:
        super().__init__()
        self.ranks = Ranks(self.size, self.memory)
        self.count = 0

    @property
    def first(self) -> Any:
        return self.ranks.servers[0]

    @initialize()
    def build_documents(self) -> None:
        for ids, fusion in builds():
            self._ask(ids, fusion, TENANTS[0])

    def _submit(self, ids: list[int], fusion: Fields, tenant: RadixNamespace) -> None:
        self.count += 1
        rid = f"r{self.count}"
        self.ranks.each(lambda server: server.submit(rid, ids, tenant, fusion))

    def _ask(self, ids: list[int], fusion: Fields, tenant: RadixNamespace) -> None:
        self._submit(ids, fusion, tenant)

        def act(server: Any) -> None:
            server.turn(400, ())
            for req in list(server.running):
                server.finish(req)

        self.ranks.each(act)

    # Several rules are the same: hypothesis takes one as often as the other.

    @rule(request=requests())
    def ask(self, request: Any) -> None:
        """Submit a request and, where nothing is in its way, run it to its end."""
        if len(self.first.waiting_queue) < 5:
            self._ask(*request)

    ask_again = rule(request=requests())(lambda self, request: self.ask(request))
    ask_more = rule(request=requests())(lambda self, request: self.ask(request))

    @rule(request=requests())
    def submit(self, request: Any) -> None:
        if len(self.first.waiting_queue) < 5:
            self._submit(*request)

    @rule(request=requests())
    def overtake(self, request: Any) -> None:
        """Refuse a request while the same prompt goes through exactly: the tree grows under the first one."""
        ids, fusion, tenant = request
        if len(self.first.waiting_queue) > 3:
            return
        self.ranks.each(lambda server: server.tree.evict(0))
        self._submit(ids, fusion, tenant)
        self._submit(ids, {"mode": "off"}, tenant)
        refusals = [True] * (len(self.first.waiting_queue) - 1)

        def act(server: Any) -> None:
            server.turn(400, refusals)
            for req in list(server.running):
                server.finish(req)

        self.ranks.each(act)
        self.turn(400, [])

    @rule(request=requests(), which=st.integers(0, 30))
    def lose_and_build_again(self, request: Any, which: int) -> None:
        """Lose a chunk on one rank, miss it, and have it built while nothing else is to be done."""
        self.disturb("chunk lost on one rank", which)
        self.disturb("tree evicted", 0)
        self.ask(request)
        self.idle()
        self.turn(400, [])
        self.ask(request)

    @rule(rows=st.sampled_from((400, 400, 60, 17)), refusals=st.lists(st.booleans(), max_size=3))
    def turn(self, rows: int, refusals: list[bool]) -> None:
        self.ranks.each(lambda server: server.turn(rows, refusals))

    turn_again = rule(rows=st.sampled_from((400, 60, 17)))(lambda self, rows: self.turn(rows, []))

    @precondition(lambda self: self.first.running)
    @rule(which=st.integers(0, 7), tokens=st.lists(st.integers(2, 40), max_size=3))
    def finish(self, which: int, tokens: list[int]) -> None:
        def act(server: Any) -> None:
            req = server.running[which % len(server.running)]
            server.decode(req, tokens)
            server.finish(req)

        self.ranks.each(act)

    @precondition(lambda self: not self.first.is_fully_idle())
    @rule(which=st.integers(0, 7), how=st.sampled_from(("retract", "abort", "abort unpublished")))
    def interrupt(self, which: int, how: str) -> None:
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        def act(server: Any) -> None:
            alive = [*server.running, *([server.cut] if server.cut else [])]
            req = (alive or server.waiting_queue)[which % len(alive or server.waiting_queue)]
            if not alive:
                server.waiting_queue.remove(req)
            elif how == "retract":
                server.retract(req)
            else:
                server.finish(req, reason=FINISH_ABORT("aborted"), publishes=how == "abort")

        self.ranks.each(act)

    @rule()
    def idle(self) -> None:
        self.ranks.each(background.before_idle)

    @rule(what=st.sampled_from(DISTURBANCES), which=st.integers(0, 30))
    def disturb(self, what: str, which: int) -> None:
        servers = self.ranks.servers
        if what == "tree evicted":
            self.ranks.each(lambda server: server.tree.evict((0, 6, 20)[which % 3]))
        elif what == "new weights":
            self.ranks.each(lambda server: server.new_weights())
        elif what == "fault":
            servers[-1].fails_at = which % 3
        else:
            for server in servers if what == "chunk evicted" else servers[:1]:
                keys = list(server.runtime.store.keys())
                if keys:
                    server.runtime.store.evict(keys[which % len(keys)])

    @invariant()
    def what_the_tree_holds_is_exact(self) -> None:
        for server in self.ranks.servers:
            checks.tree_is_exact(server)

    @invariant()
    def ranks_agree(self) -> None:
        traces = [server.trace for server in self.ranks.servers]
        for steps in zip(*traces, strict=True):
            assert all(step == steps[0] for step in steps), f"ranks computed other rows: {steps}"

    def teardown(self) -> None:
        def drain(server: Any) -> None:
            server.fails_at = None
            for _ in range(60):
                for req in list(server.running):
                    server.finish(req)
                if not (server.waiting_queue or server.cut):
                    break
                server.turn(400, ())
            assert server.is_fully_idle()

        if not self.ranks.is_sound:
            return
        self.ranks.each(drain)
        for server in self.ranks.servers:
            checks.tree_is_exact(server)
            checks.nothing_is_held(server)


class TwoRanks(Machine):
    """The same on two ranks, whose stores may lose chunks alone."""

    size = 2


class Cutting(Machine):
    """With a memory that keeps exact turns too, and loads turns elsewhere where the oldest ones were cut."""

    memory = CachedAttentionMemory

    @rule(request=requests(), cut=st.integers(0, 12))
    def talk(self, request: Any, cut: int) -> None:
        """Go on with a conversation, once whole and once without a piece behind the shared prefix."""
        ids, fusion, tenant = request
        if len(self.first.waiting_queue) > 3 or not fusion or fusion.get("mode", "fuse") != "fuse":
            return
        at = fusion["prefix_len"]
        fusion = {
            "prefix_len": at,
            "policy": fusion["policy"],
            "conversation": "c",
            "passage": False,
        }
        self._ask(ids, fusion, tenant)
        self.ranks.each(lambda server: server.tree.evict(0))
        self._ask([*ids[:at], *ids[at + cut :], 44, 43], fusion, tenant)

    @invariant()
    def turns_called_exact_are(self) -> None:
        for server in self.ranks.servers:
            checks.exact_turns_are_exact(server)


class CuttingOnTwoRanks(Cutting):
    """The same on two ranks."""

    size = 2


@pytest.fixture(autouse=True)
def _plain_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_IDLE_TURNS", 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)


@pytest.mark.parametrize("machine", [Machine, TwoRanks, Cutting, CuttingOnTwoRanks])
def test_nothing_called_exact_is_approximate_and_nothing_is_left_behind(machine: Any) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=50 if machine is Machine else 30,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
