"""What clients may send, in which form, and what is refused with which words."""

from __future__ import annotations

import dataclasses
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunk_cache.policies import create_policy
from rag_pipeline.errors import EngineError
from rag_pipeline.protocol import FusionRequest, RequestError
from rag_pipeline.protocol.fields import parse_custom_params, parse_fields, parse_request
from rag_pipeline.protocol.fusion_request import ACTION_TYPE
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.forward.report import fill_report
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.request.validation import after_tokenize
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


def envelope(payload, version="1", kind=ACTION_TYPE, times=1):
    action = SimpleNamespace(action_type=kind, action_version=version, payload=payload)
    return SimpleNamespace(actions=[action] * times)


@given(
    st.lists(st.integers(0, 30), max_size=12).map(sorted),
    st.sampled_from(["", "query", "epic:0.3", "reuse"]),
    st.sampled_from(["", "c-1"]),
)
def test_both_carriers_give_back_what_was_written(edges, policy, conversation):
    pairs = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False) if a < b]
    spans = tuple(p for i, p in enumerate(pairs) if i == 0 or p[0] >= pairs[i - 1][1])
    prefix = spans[0][0] if spans else 0
    request = FusionRequest(
        spans=spans, prefix_len=prefix, policy=policy, conversation=conversation
    )
    assert parse_custom_params(request.to_custom_params(), 40) == request
    hints = request.to_kv_hints()
    action = SimpleNamespace(**hints["actions"][0])
    assert parse_request(SimpleNamespace(actions=[action]), None, 40) == request


def test_nested_and_flat_spans_are_the_same_and_empty_ones_vanish():
    flat = parse_fields({"spans": [5, 9, 9, 9, 9, 20]}, 30)
    nested = parse_fields({"spans": [[9, 20], [5, 9], [9, 9]]}, 30)
    assert flat == nested
    assert flat.spans == ((5, 9), (9, 20))
    assert flat.prefix_len == 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"spans": [[3, 50]]}, "prompt of 30 tokens"),
        ({"spans": [[9, 3]]}, "start <= end"),
        ({"spans": [[-1, 3]]}, "0 <= start"),
        ({"spans": [[1, 5], [4, 8]]}, "overlap"),
        ({"spans": [1, 5, 7]}, "pairs"),
        ({"spans": "1-5"}, "token positions"),
        ({"spans": [[1, 2, 3]]}, "[start, end]"),
        ({"spans": [[1.0, 2.0]]}, "two integers"),
        ({"spans": [[True, 5]]}, "two integers"),
        ({"spans": [[i, i] for i in range(5000)]}, "at most 4096"),
        ({"mode": "fly"}, "fuse, build, off"),
        ({"mode": "build"}, "exactly one span"),
        ({"mode": "build", "spans": [2, 5, 5, 9]}, "exactly one span"),
        ({"mode": "build", "spans": [2, 5], "prefix_len": 1}, "right behind"),
        ({"policy": "best"}, "query"),
        ({"policy": 7}, "query:0.15"),
        ({"policy": "query", "ratio": 1.5}, "between 0 and 1"),
        ({"policy": "query", "ratio": True}, "between 0 and 1"),
        ({"policy": "query", "ratio": 10**400}, "between 0 and 1"),
        ({"policy": "query", "ratio": float("nan")}, "between 0 and 1"),
        ({"policy": "query", "options": {"mean_shift": 10**400}}, "give a smaller one"),
        ({"policy": "query:0.1", "ratio": 0.2}, "one of them"),
        ({"policy": "query", "options": {"depth": 1}}, "mean_shift"),
        ({"policy": "query", "options": [1]}, "object"),
        ({"policy": "query", "options": {"mean_shift": [1]}}, "number or a string"),
        ({"ratio": 0.2}, "without a policy"),
        ({"spans": [4, 9], "prefix_len": 6}, "from 0 to 4"),
        ({"prefix_len": "x"}, "whole number"),
        ({"span": [4, 9]}, "spans"),
        ({"conversation": ""}, "1 to 200 characters"),
        ({"conversation": 7}, "1 to 200 characters"),
        ({"conversation": "x" * 201}, "1 to 200 characters"),
        ({"conversation": "c", "mode": "off"}, "mode 'off'"),
        ({"attention": 7}, "give a name"),
        ({"attention": ""}, "fusion attention is ''; give a name such as 'dense'"),
        ({"attention": "no-such"}, "'no-such' is not known; choose one of dense"),
        ({"attention": "dense:block=4"}, "no option 'block'; allowed: none"),
        ({"attention": "x", "mode": "build", "spans": [2, 5]}, "mode 'build'"),
        ({"conversation": "c", "mode": "build", "spans": [2, 5]}, "mode 'build'"),
    ],
)
def test_malformed_fields_are_refused_in_one_line(fields, words):
    with pytest.raises(RequestError) as caught:
        parse_fields(fields, 30)
    text = str(caught.value)
    assert words in text
    assert "\n" not in text
    assert isinstance(caught.value, ValueError)  # SGLang answers ValueError with HTTP 400


def test_carriers_are_not_mixed_and_versions_are_checked():
    with pytest.raises(RequestError, match="use one of them"):
        parse_request(envelope({"mode": "off"}), {"rag_mode": "off"}, 30)
    with pytest.raises(RequestError, match="version '2'"):
        parse_request(envelope({}, version="2"), None, 30)
    with pytest.raises(RequestError, match="give one"):
        parse_request(envelope({}, times=2), None, 30)
    assert parse_request(envelope({}, kind="somebody.else"), {"temperature": 1}, 30) is None


def test_the_tokenizer_process_flattens_spans_and_refuses_bad_ones():
    def tokenized(custom, rid="a"):
        return SimpleNamespace(
            rid=rid,
            input_ids=array("q", range(30)),
            kv_hints=None,
            sampling_params=SimpleNamespace(custom_params=custom),
        )

    good = tokenized({"rag_spans": [[3, 8], [8, 12]], "mine": 1})
    after_tokenize(good, None)
    assert good.sampling_params.custom_params == {
        "mine": 1,
        "rag_mode": "fuse",
        "rag_prefix_len": 3,
        "rag_spans": [3, 8, 8, 12],
    }
    untouched = tokenized({"mine": 1})
    after_tokenize(untouched, None)
    assert untouched.sampling_params.custom_params == {"mine": 1}
    with pytest.raises(RequestError, match="30 tokens"):
        after_tokenize(tokenized({"rag_spans": [[3, 99]]}), None)
    with pytest.raises(RequestError, match="are taken"):
        after_tokenize(tokenized({}, rid="rag-internal-1"), None)


def test_configuration_is_read_from_the_environment_and_checked():
    assert FusionConfig.from_env({}) == FusionConfig()
    assert not FusionConfig.from_env({"RAG_PIPELINE_FUSION": "off"}).enabled
    config = FusionConfig(policy="epic:0.2", store_bytes=1 << 20, automatic=False)
    assert FusionConfig.from_env({"RAG_PIPELINE_FUSION": config.to_env()}) == config
    for text, words in [
        ("maybe", "on, off, or a JSON object"),
        ("[1]", "JSON object"),
        ('{"polcy": 1}', "allowed: enabled"),
        ('{"policy": "best"}', "query"),
        ('{"store_bytes": "2g"}', "give int"),
        ('{"store_bytes": -1}', "positive"),
    ]:
        with pytest.raises(EngineError, match=words):
            FusionConfig.from_env({"RAG_PIPELINE_FUSION": text})
    assert {f.name for f in dataclasses.fields(FusionConfig)} >= {"background", "self_check"}


def test_who_takes_reports_in_and_fails_stops_no_answers(monkeypatch):
    from rag_pipeline.sglang_plugin.fusion.forward import report

    heard = []
    monkeypatch.setattr(report, "LISTENERS", [lambda meta: {}["a fault"], heard.append])
    state = SimpleNamespace(
        customized_info_accumulated={"rag_fusion": [{"reused_tokens": 5}]},
        customized_info_reported_keys=set(),
    )
    meta = {}
    report.around_update_meta_info(lambda *args: None, None, meta, state, {}, 0, None)
    assert heard == [meta] == [{"rag_fusion": {"reused_tokens": 5}}]


def test_every_message_of_a_stream_shows_the_report_as_one_dict():
    from rag_pipeline.sglang_plugin.fusion.forward.report import around_update_meta_info

    def sglang(manager, meta_info, state, customized_info, index, finish_reason):
        meta_info.update({key: values[index] for key, values in customized_info.items()})

    from rag_pipeline.sglang_plugin.fusion.forward.report import after_coalesce

    fused, other = (
        SimpleNamespace(customized_info_accumulated={}, customized_info_reported_keys=set())
        for _ in range(2)
    )
    seen = []
    # The report comes with the first message; later ones carry other fields or none; the second request has none.
    for payload in ({"rag_fusion": [[{"reused_tokens": 5}], []], "x": [1, 2]}, {"x": [3, 4]}, {}):
        for index, state in enumerate((fused, other)):
            meta = {}
            around_update_meta_info(sglang, None, meta, state, payload, index, None)
            seen.append(meta)
    assert [m.get("rag_fusion") for m in seen[::2]] == [{"reused_tokens": 5}] * 3
    assert all("rag_fusion" not in m for m in seen[1::2])
    assert [m.get("x") for m in seen] == [1, 2, 3, 4, None, None]
    joined = {"meta_info": {"rag_fusion": ["reused_tokens"]}}
    after_coalesce(joined, None, [{"meta_info": m} for m in seen[::2]])
    assert joined["meta_info"]["rag_fusion"] == {"reused_tokens": 5}


@pytest.mark.parametrize(("chosen", "recomputed"), [([60], 2), ([60, 99], 2), ([99], 1), ([], 1)])
def test_the_last_token_is_counted_once_whether_a_policy_chose_it_or_not(chosen, recomputed):
    state = RequestState(FusionRequest(), create_policy("query:0.1"), array("q", range(100)))
    lease = SimpleNamespace(release=lambda: None)
    state.lease([SimpleNamespace(start=50, end=100, is_turn=False, lease=lease)])
    state.note_recomputed(chosen)
    fill_report(FusionRuntime(FusionConfig(), None), state)
    report = state.report
    assert (report.recomputed_tokens, report.reused_tokens) == (recomputed, 50 - recomputed)
    assert sum(tokens for _, tokens in report.runs) == 100
    kinds = np.repeat([kind for kind, _ in report.runs], [tokens for _, tokens in report.runs])
    assert (kinds == 2).sum() == recomputed
