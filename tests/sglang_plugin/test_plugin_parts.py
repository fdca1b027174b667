"""The plugin's parts that need no engine: table, noise, switches, core groups, buckets, errors."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

import rag_pipeline.sglang_plugin as plugin
from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.cpu import detect
from rag_pipeline.sglang_plugin.hook_table import (
    HookTarget,
    PluginRefused,
    fail_hard,
    verify_targets,
)
from rag_pipeline.sglang_plugin.launch import fault_report, fork_server, noise, startup


def test_the_door_imports_neither_torch_nor_sglang():
    code = "import sys, rag_pipeline.sglang_plugin as p; print('torch' in sys.modules, 'sglang' in sys.modules, p.register)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False False")


# ---- hook table ---------------------------------------------------------------------------------


def test_a_target_that_is_gone_stops_the_process_not_only_a_log_line():
    row = HookTarget(path="json.decoder.NoSuchThing", kind="after", why="test")
    with pytest.raises(PluginRefused, match=r"NoSuchThing.*pip install sglang==") as caught:
        verify_targets([row])
    assert not isinstance(caught.value, Exception)  # SGLang's `except Exception` lets it through


def test_a_target_that_lost_a_parameter_is_refused():
    row = HookTarget(path="json.dumps", kind="after", why="test", params=("obj", "gone"))
    with pytest.raises(PluginRefused, match=r"json\.dumps lost the parameter\(s\) gone"):
        verify_targets([row])


def test_a_target_that_is_there_passes():
    verify_targets([HookTarget(path="json.dumps", kind="after", why="test", params=("obj",))])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'beside'; allowed are before"):
        HookTarget(path="json.dumps", kind="beside", why="test")


def test_a_failing_registration_is_not_an_exception_sglang_can_swallow():
    with pytest.raises(PluginRefused, match="failed to register: KeyError"), fail_hard():
        raise KeyError("x")


# ---- switches -----------------------------------------------------------------------------------


def test_off_switch_declines_platform_and_hooks(monkeypatch):
    monkeypatch.setenv(plugin.OFF_SWITCH, "off")
    assert plugin.activate_platform() is None
    assert plugin.register() is None


def test_a_misspelt_switch_is_refused(monkeypatch):
    monkeypatch.setenv(plugin.OFF_SWITCH, "0")
    with pytest.raises(SystemExit, match="'0'; allowed are 'on' and 'off'"):
        plugin.plugin_is_off()
    monkeypatch.setenv(fork_server.FAST_START, "yes")
    with pytest.raises(EngineError, match="'yes'; allowed are 'on' and 'off'"):
        fork_server.fast_start_wanted()


def test_platform_declines_where_sglang_has_its_own(monkeypatch):
    monkeypatch.setattr(detect, "accelerator_present", lambda: True)
    assert plugin.activate_platform() is None
    monkeypatch.setattr(detect, "accelerator_present", lambda: False)
    assert plugin.activate_platform() == "rag_pipeline.sglang_plugin.cpu.platform:RagCpuPlatform"
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert plugin.activate_platform() is None


@pytest.mark.parametrize(
    ("asked", "computes", "wanted"),
    [
        ("auto", True, "auto"),
        ("auto", False, "float32"),
        ("bfloat16", False, "bfloat16"),
        ("float16", False, "float16"),
    ],
)
def test_a_cpu_without_bf16_computes_in_fp32_unless_told_otherwise(
    monkeypatch, asked, computes, wanted
):
    import sglang.srt.server_args  # noqa: F401  # first: it imports the platforms, and they this module

    from rag_pipeline.sglang_plugin.cpu import platform

    monkeypatch.setattr(platform, "computes_bf16", lambda: computes)
    arguments = SimpleNamespace(
        attention_backend=None,
        dtype=asked,
        model_path="nowhere",
        speculative_algorithm=None,
        tp_size=1,
        pp_size=1,
        dp_size=1,
        dcp_size=1,
    )
    platform.RagCpuPlatform().apply_server_args_defaults(arguments)
    assert arguments.dtype == wanted
    assert arguments.attention_backend == "rag_cpu"


@pytest.mark.parametrize(
    ("config", "asked", "wanted"),
    [
        ('{"dtype": "float32"}', "auto", "bfloat16"),
        ('{"torch_dtype": "float16"}', "auto", "bfloat16"),
        ("{}", "auto", "bfloat16"),  # SGLang takes it for fp32
        ('{"dtype": "bfloat16"}', "auto", "auto"),
        ('{"dtype": "float32"}', "float16", "float16"),
        ("[]", "auto", "auto"),
        (None, "auto", "auto"),
    ],
)
def test_a_cpu_that_computes_bf16_is_not_left_to_emulate_fp16(
    monkeypatch, tmp_path, config, asked, wanted
):
    import sglang.srt.server_args  # noqa: F401

    from rag_pipeline.sglang_plugin.cpu import platform

    monkeypatch.setattr(platform, "computes_bf16", lambda: True)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    arguments = SimpleNamespace(
        attention_backend=None, dtype=asked, speculative_algorithm=None, model_path=str(tmp_path),
        tp_size=1, pp_size=1, dp_size=1,
    )  # fmt: skip
    platform.RagCpuPlatform().apply_server_args_defaults(arguments)
    assert arguments.dtype == wanted


@pytest.mark.parametrize("backend", [None, "rag_cpu", "torch_native"])
def test_tokens_dealt_out_over_the_ranks_are_refused_in_one_line(backend):
    import sglang.srt.server_args  # noqa: F401  # as above

    from rag_pipeline.sglang_plugin.cpu.platform import RagCpuPlatform

    arguments = SimpleNamespace(attention_backend=backend, dcp_size=2, tp_size=2)
    with pytest.raises(EngineError, match=r"^dcp_size 2: .*; start with dcp_size=1, .*\.$"):
        RagCpuPlatform().apply_server_args_defaults(arguments)


def test_drafted_tokens_need_a_backend_that_knows_trees():
    import sglang.srt.server_args  # noqa: F401  # as above

    from rag_pipeline.sglang_plugin.cpu.attention_backend import refusal
    from rag_pipeline.sglang_plugin.cpu.platform import RagCpuPlatform

    platform = RagCpuPlatform()
    arguments = SimpleNamespace(
        attention_backend="torch_native",
        speculative_algorithm="NGRAM",
        dtype="float32",
        dcp_size=1,
    )
    with pytest.raises(EngineError, match=r"torch_native.*trees.*'rag_cpu'"):
        platform.apply_server_args_defaults(arguments)
    assert platform.supports_speculative_algorithm("NGRAM")
    assert not platform.supports_speculative_algorithm("EAGLE")
    with pytest.raises(EngineError, match=r"'EAGLE'.*'NGRAM'"):
        platform.get_speculative_worker_cls("EAGLE")

    from sglang.srt.layers.radix_attention import RadixAttention

    layer = RadixAttention(4, 16, 0.25, 2, layer_id=0, sliding_window_size=8)
    runner = SimpleNamespace(use_mla_backend=False, model=layer, server_args=arguments)
    assert "trees of drafted tokens" in refusal(runner)
    runner.use_mla_backend = True
    assert "MLA" in refusal(runner)
    arguments.speculative_algorithm = None
    assert refusal(runner) is None  # MLA itself is served


# ---- noise --------------------------------------------------------------------------------------


def test_known_noise_is_dropped_and_real_warnings_are_not():
    module, text = noise.WARNING_NOISE[0]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        noise.install()
        warnings.warn_explicit(text, UserWarning, "x.py", 1, module=module)
        assert seen == []
        warnings.warn_explicit("AWQ weights are corrupt", UserWarning, "x.py", 2, module=module)
        warnings.warn_explicit(text, UserWarning, "x.py", 3, module="somewhere.else")
        warnings.warn_explicit(text, RuntimeWarning, "x.py", 4, module=module)
    assert len(seen) == 3


def test_known_log_noise_is_dropped_and_real_records_are_not(caplog):
    noise.install()
    noise.install()  # twice changes nothing
    name, text = noise.LOG_NOISE[0]
    with caplog.at_level(logging.INFO):
        logging.getLogger(name).warning("%s and more", text)
        assert caplog.records == []
        logging.getLogger(name).warning("Ignore import error when loading my_model")
        logging.getLogger("sglang.elsewhere").warning(text)
    assert len(caplog.records) == 2
    assert sum(isinstance(f, noise._StartsWith) for f in logging.getLogger(name).filters) == 2


# ---- cores, buckets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "ranks", "want"),
    [
        ({0, 1}, 1, "0,1"),
        ({0, 1}, 2, "0|1"),
        ({0, 1, 2, 5, 7}, 2, "0,1,2|5,7"),
        ({4}, 2, "4|4"),
    ],
)
def test_core_groups(monkeypatch, cores, ranks, want):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    assert detect.core_groups(ranks) == want


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [1, 99, 100, 19, 98, 1], [2400, 8, 2300, 9]])
def test_decode_buckets_hold_each_request_once_and_pad_little(lengths):
    from rag_pipeline.sglang_plugin.cpu.slot_plan import decode_buckets

    groups = decode_buckets(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[index] for index in group]
        assert own[0] == max(own)
        assert own[-1] == min(own)
        assert max(own) * len(own) <= 1.25 * sum(own)
    if len(set(lengths)) == 1:
        assert len(groups) == 1


def test_without_padding_only_equal_lengths_share_a_call():
    from rag_pipeline.sglang_plugin.cpu.slot_plan import decode_buckets

    groups = decode_buckets([7, 9, 7, 8, 9], padding=1.0)
    assert sorted(sorted(group) for group in groups) == [[0, 2], [1, 4], [3]]


def test_a_misspelt_decode_mode_is_refused(monkeypatch):
    from rag_pipeline.sglang_plugin.cpu import attention_backend as cpu_attention

    monkeypatch.setenv(cpu_attention.DECODE, "quick")
    with pytest.raises(EngineError, match="'quick'; allowed are 'exact' and 'fast'"):
        cpu_attention.decode_is_fast()


# ---- launcher -----------------------------------------------------------------------------------


def test_missing_folder_is_one_line(tmp_path):
    with pytest.raises(EngineError, match=r"no model at .*config\.json not found"):
        startup.create_engine(str(tmp_path))


def test_broken_config_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be read"):
        startup.create_engine(str(tmp_path))


def test_port_in_use_is_one_line(tmp_path):
    import socket

    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} on 127.0.0.1 cannot be used"):
            startup.create_engine(str(tmp_path), port=port)


def test_child_takes_over_the_environment_of_the_moment(monkeypatch):
    entry = fork_server.WithEnvironment(os.getenv)
    monkeypatch.setenv("RAG_PIPELINE_TEST_VARIABLE", "set after the entry was made")
    data = pickle.dumps(entry)
    monkeypatch.delenv("RAG_PIPELINE_TEST_VARIABLE")
    monkeypatch.setenv("RAG_PIPELINE_TEST_STALE", "1")
    before = dict(os.environ)
    try:
        child = pickle.loads(data)
        assert child("RAG_PIPELINE_TEST_VARIABLE") == "set after the entry was made"
        assert "RAG_PIPELINE_TEST_STALE" not in os.environ
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_why_a_scheduler_died_reaches_the_fault_file(tmp_path, monkeypatch):
    path = tmp_path / "fault"
    monkeypatch.setenv(fault_report.FAULT_FILE, str(path))

    def scheduler_that_logs():
        logging.getLogger("sglang.srt.managers.scheduler").error(
            "Scheduler hit an exception: Traceback\n  File x\nValueError: no such dtype\n"
        )

    # SGLang's own scheduler ends as if all were well: nobody would look at it.
    with pytest.raises(SystemExit) as end:
        fault_report.run_and_report(scheduler_that_logs)
    assert end.value.code == 1
    with pytest.raises(SystemExit):
        fault_report.run_and_report(sys.exit, "hook gone")
    assert path.read_text().splitlines() == ["ValueError: no such dtype", "hook gone"]
