"""Whatever the plugin takes of SGLang stands in the table of hooks, and is there in the installed release."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rag_pipeline.sglang_plugin as plugin
from rag_pipeline.sglang_plugin.hook_table import HookTarget, PluginRefused, verify_targets
from rag_pipeline.sglang_plugin.internals import (
    HICACHE,
    INTERNALS,
    LAUNCHING,
    QUANTISED,
    SPECULATING,
)

FOLDER = Path(plugin.__file__).parent
SRT = "sglang.srt."

OBJECTS = {
    "scheduler": "managers.scheduler.Scheduler",
    "tp_worker": "managers.tp_worker.TpModelWorker",
    "runner": "model_executor.model_runner.ModelRunner",
    "model_runner": "model_executor.model_runner.ModelRunner",
    "model_config": "configs.model_config.ModelConfig",
    "req": "managers.schedule_batch.Req",
    "kv": "managers.schedule_batch.ReqKvInfo",
    "adder": "managers.schedule_policy.PrefillAdder",
    "schedule_batch": "managers.schedule_batch.ScheduleBatch",
    "batch": "model_executor.forward_batch_info.ForwardBatch",
    "forward_batch": "model_executor.forward_batch_info.ForwardBatch",
    "forward_mode": "model_executor.forward_batch_info.ForwardMode",
    "layer": "layers.radix_attention.RadixAttention",
    "norm": "layers.layernorm.RMSNorm",
    "rotation": "layers.rotary_embedding.base.RotaryEmbedding",
    "req_to_token_pool": "mem_cache.memory_pool.ReqToTokenPool",
    "token_to_kv_pool": "mem_cache.memory_pool.MHATokenToKVPool",
    "token_to_kv_pool_allocator": "mem_cache.allocator.token.TokenToKVPoolAllocator",
    "allocator": "mem_cache.allocator.token.TokenToKVPoolAllocator",
    "sampling_params": "sampling.sampling_params.SamplingParams",
    "StorageBackendFactory": "mem_cache.storage.StorageBackendFactory",
    "storage": "mem_cache.hicache_storage.HiCacheStorage",
    "file_storage": "mem_cache.hicache_storage.HiCacheFile",
    "mooncake_storage": "mem_cache.storage.mooncake_store.mooncake_store.MooncakeStore",
    "HookRegistry": "plugins.hook_registry.HookRegistry",
    "HookType": "plugins.hook_registry.HookType",
}
"""Class of SGLang behind a name that this package gives to its objects, everywhere alike."""

OTHERWISE = {
    # torch's own, on any module.
    ("layer", "register_forward_pre_hook"),
    # Tensors in these two; the pools of sliding windows have their own row.
    ("kv", "float"),
    ("token_to_kv_pool", "layers_mapping"),
    ("token_to_kv_pool", "translate_loc_from_full_to_swa"),
}


def sources() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(FOLDER.rglob("*.py")):
        yield str(path.relative_to(FOLDER)), ast.parse(path.read_text("utf-8"))


def imported() -> Iterator[tuple[str, str]]:
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(SRT):
                yield from ((file, f"{node.module}.{name.name}") for name in node.names)
            elif isinstance(node, ast.Import):
                yield from ((file, a.name) for a in node.names if a.name.startswith(SRT))


def read() -> Iterator[tuple[str, str, str]]:
    """File, object and attribute of everything that is called, read or set on SGLang's objects."""
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                of, name = node.value, node.attr
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "getattr"
                and isinstance(node.args[1], ast.Constant)
            ):
                of, name = node.args[0], str(node.args[1].value)
            else:
                continue
            place = of.id if isinstance(of, ast.Name) else getattr(of, "attr", "")
            place = place.removeprefix("_")
            if place in OBJECTS and (place, name) not in OTHERWISE:
                yield file, place, name


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[HookTarget]:
    """Every row, as the plugin registers them, without registering a hook."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from rag_pipeline.sglang_plugin.cpu.mla import FORM_TARGETS, ROPE_TARGETS
    from rag_pipeline.sglang_plugin.cpu.speculation import install
    from rag_pipeline.sglang_plugin.fusion.hooks import hook_rows
    from rag_pipeline.sglang_plugin.tpla.loading import TARGETS as TPLA_TARGETS

    install()  # without it, the worker's module asks for a compiled kernel
    monkeypatch.setattr(HookRegistry, "register", lambda *args: None)
    return [
        *(row for row, _ in hook_rows()),
        *INTERNALS,
        *LAUNCHING,
        *HICACHE,
        *QUANTISED,
        *SPECULATING,
        *ROPE_TARGETS,
        *FORM_TARGETS,
        *TPLA_TARGETS,
    ]


def test_every_import_from_sglang_is_in_the_table(table: list[HookTarget]) -> None:
    paths = {row.path for row in table}
    missing = {
        f"{file}: {path}"
        for file, path in imported()
        if not any(known == path or known.startswith(f"{path}.") for known in paths)
    }
    assert not missing


def test_everything_that_is_called_or_read_of_sglangs_objects_is_in_the_table(
    table: list[HookTarget],
) -> None:
    known = {row.path for row in table}
    known |= {f"{row.path}.{name}" for row in table for name in row.attributes}
    missing = {
        f"{file}: {SRT}{OBJECTS[place]}.{name}"
        for file, place, name in read()
        if f"{SRT}{OBJECTS[place]}.{name}" not in known
    }
    assert not missing


def test_every_row_is_there_in_the_installed_release(table: list[HookTarget]) -> None:
    verify_targets(table)


def test_an_attribute_that_is_gone_is_refused_and_one_of_init_is_found() -> None:
    path = "collections.abc.Sequence"
    verify_targets([HookTarget(path=path, kind="uses", why="test", attributes=("index",))])
    row = HookTarget(path=path, kind="uses", why="test", attributes=("index", "gone"))
    with pytest.raises(PluginRefused, match=r"Sequence lost gone"):
        verify_targets([row])
    made = HookTarget(
        path="logging.Logger", kind="uses", why="test", attributes=("parent", "disabled")
    )
    verify_targets([made])


def test_settings_that_decide_about_fusion_are_settings_of_sglang() -> None:
    from sglang.srt.server_args import ServerArgs

    tree = ast.parse((FOLDER / "fusion" / "runtime" / "support.py").read_text("utf-8"))
    names = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "setting"
        and isinstance(node.args[0], ast.Constant)
    }
    args = ServerArgs(model_path="none")
    assert names
    assert {name for name in names if not hasattr(args, str(name))} == set()
