"""A request as the scheduler holds it, and the adder that gives a batch its room."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace


class Req:
    """What fusion reads and writes of SGLang's ``Req``; whatever else it asks for is unset."""

    def __init__(
        self, rid: str, ids: Sequence[int], tenant: RadixNamespace, fusion: dict[str, Any] | None
    ) -> None:
        self.rid, self.extra_key, self.cache_salt = rid, tenant.extra_key, tenant.cache_salt
        self.origin_input_ids = self.full_untruncated_fill_ids = array("q", ids)
        self.output_ids: list[int] = []
        self.prefix_len = 0
        self.extend_end = 0
        self.kv = SimpleNamespace(req_pool_idx=None, cache_protected_len=0)
        custom = None if fusion is None else {f"rag_{key}": v for key, v in fusion.items()}
        self.sampling_params = SimpleNamespace(custom_params=custom, max_new_tokens=4)
        self.path: list[Any] = []
        self.is_finished = False
        self.approximate_from: int | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    @property
    def tenant(self) -> RadixNamespace:
        return RadixNamespace(self.extra_key, self.cache_salt)

    @property
    def output_ids_through_stop(self) -> list[int]:
        return self.output_ids

    @property
    def held(self) -> int:
        """Positions whose KV it has."""
        return 0 if self.kv.req_pool_idx is None else self.extend_end

    def finished(self) -> bool:
        return self.is_finished

    def is_dllm(self) -> bool:
        return False


class Adder:
    """SGLang's ``PrefillAdder``: budgets, and the requests that were admitted."""

    def __init__(self, rows: int, refusals: Sequence[bool]) -> None:
        self.rem_input_tokens = self.rem_chunk_tokens = rows
        self.can_run_list: list[Req] = []
        self.refusals = list(refusals)
        self.has_cut = False
        self.running_batch = SimpleNamespace(reqs=[])

    def budget_state(self) -> Any:
        """Whether another request may come."""
        from sglang.srt.managers.schedule_policy import AddReqResult

        return AddReqResult.CONTINUE if self.rem_chunk_tokens > 0 else AddReqResult.OTHER
