"""Decoding token by token: captures on a stand-in for CUDA graphs, caches that wait for the next sequence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx import Graph

import liftc
from liftc.runtime.decoding import ROOM_MULTIPLE, WARM_STEPS, Decoder, Decoders
from liftc.runtime.executor import BoundGraph

Tensor = torch.Tensor
CPU = torch.device("cpu")


class Replays:
    """What a CUDA graph does: the same calls on the same memory, the result in the same place."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.run, self.result, self.count = run, run().clone(), 0

    def replay(self) -> None:
        self.count += 1
        self.result.copy_(self.run())


MADE: list[Replays] = []


def make(run: Callable[[], Tensor]) -> tuple[Replays, Tensor]:
    MADE.append(Replays(run))
    return MADE[-1], MADE[-1].result


def graphs(device: torch.device = CPU) -> dict[str, BoundGraph]:
    """A decode graph that keeps every token in the cache and returns the sum of them as logits."""
    graph = Graph()
    token, position, cache = (graph.placeholder(name) for name in ("token", "position", "k_cache_0"))
    cache.meta["type"] = "i64[1,1,s,1]"
    kept = graph.call_function(
        torch.ops.aten.index_copy_.default,
        (cache, 2, position, graph.call_method("view", (token, 1, 1, 1, 1))),
    )
    graph.output((graph.call_method("sum", (kept,)),))
    bound = BoundGraph(graph, {}, device)
    return {"decode": bound, "prefill": bound}


def decoded(decoder: Decoder, tokens: list[int]) -> list[int]:
    device = decoder.cache.tensors[0].device
    return [int(decoder.step(torch.tensor([[t]], device=device), i)) for i, t in enumerate(tokens)]


def test_replays_give_what_separate_launches_give() -> None:
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    MADE.clear()
    want = decoded(Decoder(graphs(), len(tokens), None), tokens)
    assert want == [sum(tokens[: i + 1]) for i in range(len(tokens))] and not MADE
    assert decoded(Decoder(graphs(), len(tokens), make), tokens) == want
    assert len(MADE) == 1 and MADE[0].count == len(tokens) - WARM_STEPS


def test_short_sequences_are_not_captured() -> None:
    MADE.clear()
    decoded(Decoder(graphs(), 9, make), list(range(WARM_STEPS)))
    assert not MADE


def test_a_capture_that_fails_is_reported_once_and_decoding_goes_on() -> None:
    def fails(run: Callable[[], Tensor]) -> tuple[Replays, Tensor]:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    decoder, tokens = Decoder(graphs(), 9, fails), [1] * (WARM_STEPS + 1)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph.*: operation not permitted$"):
        assert decoded(decoder, tokens) == [i + 1 for i in range(len(tokens))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int(decoder.step(torch.tensor([[1]]), len(tokens))) == len(tokens) + 1


def test_the_decoder_of_a_length_waits_with_an_empty_cache() -> None:
    decoders = Decoders(graphs(), torch.device("cuda"), True)
    first = decoders.take(ROOM_MULTIPLE + 1, 1000)
    assert first.room == 2 * ROOM_MULTIPLE
    decoded(first, [7, 7])
    decoders.give_back(first)
    again = decoders.take(2 * ROOM_MULTIPLE, 1000)
    assert again is first and decoded(again, [1, 2]) == [1, 3]
    other = decoders.take(2 * ROOM_MULTIPLE, 1000)  # while the first is in use
    assert other is not first
    decoders.give_back(first)
    assert decoders.take(5, 1000) is not first and decoders.take(2 * ROOM_MULTIPLE, 1000) is not first


@pytest.mark.parametrize("room, most, want", [(1, 1000, ROOM_MULTIPLE), (65, 100, 100), (70, 60, 70)])
def test_room_on_a_gpu(room: int, most: int, want: int) -> None:
    assert Decoders(graphs(), torch.device("cuda"), True).take(room, most).room == want


def test_nothing_waits_where_nothing_is_captured() -> None:
    for decoders in (Decoders(graphs(), CPU, True), Decoders(graphs(), torch.device("cuda"), False)):
        decoder = decoders.take(5, 1000)
        decoders.give_back(decoder)
        assert decoders.take(5, 1000) is not decoder
    assert Decoders(graphs(), CPU, True).take(1, 1000).room == 2


def test_streams_at_once_and_one_after_the_other(artifact: Path) -> None:
    model = liftc.load(artifact, "cpu")
    prompts, count = ([5, 6, 7], [9, 8, 7]), WARM_STEPS + 5
    want = [list(model.stream(p, count, stop_tokens=())) for p in prompts]
    MADE.clear()
    model._decoders._make = make
    assert [list(model.stream(p, count, stop_tokens=())) for p in prompts] == want
    assert len(MADE) == 1, "the second sequence replays the capture of the first"
    assert list(zip(*(model.stream(p, count, stop_tokens=()) for p in prompts))) == list(zip(*want))
    assert len(MADE) == 2
    stream = model.stream(prompts[0], count, stop_tokens=())
    next(stream)
    stream.close()  # gives its cache back
    assert len(model._decoders._waiting) == 1
