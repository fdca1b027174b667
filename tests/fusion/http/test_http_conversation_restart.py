"""A conversation goes on in the next life of a server, with the turns that the last one left in its folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fusion_helpers import PREFIX, PREFIX_IDS, tokens

from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

pytestmark = [pytest.mark.engine, pytest.mark.slow]

USER, ANSWER, TURNS = 60, 8, 3
TALK = FusionRequest(prefix_len=PREFIX, policy="reuse", conversation="a chat")


@pytest.fixture(scope="module")
def life(
    model: Path, sglang_process: Any, client_of: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """``with life(name) as client``: a server over the one folder."""
    place = tmp_path_factory.mktemp("restart")
    config = FusionConfig(background=False, store_dir=str(place / "kv"))

    @contextmanager
    def start(name: str) -> Iterator[Any]:
        variables = {FUSION_VARIABLE: config.to_env()}
        options = {"dtype": "float32", "max_total_tokens": 4096, "random_seed": 1}
        with sglang_process(
            model, place / f"{name}.txt", variables, sleep_on_idle=True, **options
        ) as (url, _):
            yield client_of({"url": url})

    return start


def said(answer: Any) -> tuple[list[int], list[float], dict[str, Any]]:
    meta = answer["meta_info"]
    ids = [token for _, token, *_ in meta["output_token_logprobs"]]
    values = [value for value, *_ in meta["output_token_logprobs"]]
    return ids, values, meta.get("rag_fusion", {})


def test_the_second_life_restores_the_turns_and_says_the_same(life: Any) -> None:
    ids = list(PREFIX_IDS)
    with life("one") as client:
        for turn in range(TURNS):
            ids += tokens(USER, 300 + turn)
            ids += said(client.generate(ids, TALK))[0]
        asked = [*ids, *tokens(USER, 400)]
        without = said(client.generate(asked, FusionRequest(mode="off")))
        deadline = time.monotonic() + 60
        while client.state()["pending"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        counts = client.state()["counts"]
        assert counts["turns.stored"] == TURNS
        assert counts["disk.written"] == TURNS
    with life("two") as client:
        assert client.state()["counts"]["turns.restored"] == TURNS
        restored = said(client.generate(asked, TALK))
        # All that was said before but the last token of an answer, which was never fed to the model.
        left = TURNS * (USER + ANSWER) - 1
        kinds = ("conversation_tokens", "reused_tokens", "recomputed_tokens", "fallback")
        assert [restored[2][kind] for kind in kinds] == [left, left, 0, ""]
        assert restored[2]["exact_prefix_tokens"] == 0  # the radix tree of this life is empty
        assert restored[0] == without[0]
        assert restored[1] == pytest.approx(without[1], abs=1e-3)
        client.flush()
        stranger = said(client.generate(asked, TALK, cache_salt="somebody else"))
        assert stranger[2]["conversation_tokens"] == 0
        assert stranger[0] == without[0]
