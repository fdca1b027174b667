"""Chunk KV copied to the device beside the forward: what waits for what, and what is held how long. On the CPU only."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch

from chunk_cache import ChunkKey, ChunkKV, LayerKV, LoadingChunk, Patience, as_token_ids
from rag_kernels import RotarySpec
from rag_pipeline.sglang_plugin.fusion.forward.loader import Loader, LoadItem
from rag_pipeline.sglang_plugin.fusion.runtime.copy_stream import CopyStream

CPU = torch.device("cpu")
LAYERS, TOKENS, HEADS, DIM = 4, 6, 2, 8
SPEC = RotarySpec.from_inv_freq(
    1.0 / 10_000 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
)


class Streams:
    """Streams and events that note what is asked of them; an event has passed when the test says so."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.passed: set[int] = set()
        self.on_copy_stream = False
        self.num_events = 0
        outer = self

        class Event:
            def __init__(self) -> None:
                self.number, outer.num_events = outer.num_events, outer.num_events + 1

            def record(self, stream: object) -> None:
                assert outer.on_copy_stream
                outer.calls.append(f"copied {self.number}")

            def query(self) -> bool:
                return self.number in outer.passed

        class Stream:
            def wait_event(self, event: Event) -> None:
                assert not outer.on_copy_stream
                outer.calls.append(f"wait {event.number}")

        self.Event, self.Stream = Event, Stream

    @contextlib.contextmanager
    def stream(self, stream: object):
        self.on_copy_stream = True
        yield
        self.on_copy_stream = False

    def current_stream(self):
        return self.Stream()


def record_of(number: int) -> ChunkKV:
    ids = as_token_ids(torch.arange(TOKENS).numpy() + 100 * number)
    generator = torch.Generator().manual_seed(number)
    k, v = (torch.randn(LAYERS, TOKENS, HEADS, DIM, generator=generator) for _ in range(2))
    return ChunkKV(key=ChunkKey.of("a" * 32, ids), token_ids=ids, base_position=3, k=k, v=v)


def pools():
    return [(torch.zeros(40, HEADS, DIM), torch.zeros(40, HEADS, DIM)) for _ in range(LAYERS)]


def items_of(records):
    return [
        LoadItem(
            record=record,
            chunk_offset=0,
            slots=torch.arange(1 + TOKENS * n, 1 + TOKENS * (n + 1)),
            delta=5 * n,
        )
        for n, record in enumerate(records)
    ]


def load(loader, written, layers=range(LAYERS)):
    for layer in layers:
        loader.ensure(layer, *written[layer])


@pytest.mark.parametrize("with_module", ["torch.cpu", "noted"])
def test_what_is_copied_ahead_is_what_is_read_without(with_module):
    records = [record_of(1), record_of(2)]
    want, got = pools(), pools()
    load(Loader(items_of(records), SPEC), want)
    module = torch.cpu if with_module == "torch.cpu" else Streams()
    load(Loader(items_of(records), SPEC, copies=CopyStream(CPU, module)), got)
    for (k, v), (k_got, v_got) in zip(want, got, strict=True):
        assert k.any()
        assert torch.equal(k, k_got)
        assert torch.equal(v, v_got)


def test_the_next_layer_is_copied_before_this_one_is_computed_and_waited_for_in_its_turn():
    streams = Streams()
    loader = Loader(items_of([record_of(1)]), SPEC, copies=CopyStream(CPU, streams))
    written = pools()
    for layer in range(LAYERS):
        loader.ensure(layer, *written[layer])
        streams.calls.append(f"compute {layer}")
    assert streams.calls == [
        "copied 0",
        *("wait 0", "copied 1", "compute 0"),
        *("wait 1", "copied 2", "compute 1"),
        *("wait 2", "copied 3", "compute 2"),
        *("wait 3", "compute 3"),
    ]


def test_a_layer_that_has_not_come_is_not_waited_for_ahead():
    record, streams = record_of(1), Streams()
    empty = torch.zeros_like(record.k)
    loading = LoadingChunk(
        ChunkKV(
            key=record.key, token_ids=record.token_ids, base_position=3, k=empty, v=empty.clone()
        ),
        Patience(0.0),
    )
    loading.fill(0, record.layer(0))
    loader = Loader(items_of([loading]), SPEC, copies=CopyStream(CPU, streams))
    written = pools()
    load(loader, written, [0])
    assert streams.calls == ["copied 0", "wait 0"]
    loading.fill(1, record.layer(1))
    loading.fill(2, record.layer(2))
    load(loader, written, [1])
    assert streams.calls[2:] == ["copied 1", "wait 1", "copied 2"]


def test_sources_are_held_until_their_copy_is_over():
    streams = Streams()
    copies = CopyStream(CPU, streams)
    freed: list[int] = []
    for number in range(3):
        source = torch.ones(2, 1, 1)
        weakref.finalize(source, freed.append, number)
        copies.copy([LayerKV(source, source)])
        del source
    assert copies.num_held == 3
    assert freed == []
    streams.passed |= {1, 2}  # in order: what is behind an open one is held, too
    assert copies.num_held == 3
    streams.passed.add(0)
    assert copies.num_held == 0
    assert freed == [0, 1, 2]
