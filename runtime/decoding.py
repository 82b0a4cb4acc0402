"""The decode graph of a language model with its KV cache: on a GPU it is captured once and replayed for every token.

A token costs about a thousand launches, and Python takes longer to make them than a GPU to run them. Kernels, their
order and their operands are those of separate launches, and so are the results, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from liftc.runtime.executor import BoundGraph, KVCache

WARM_STEPS = 4
"""Tokens decoded by separate launches before the capture: short answers are not worth one, and what operations make
when they are first called must be there."""

ROOM_MULTIPLE = 64
"""Tokens that the room of a cache on a GPU is a multiple of, so that a capture serves prompts of about a length."""

Tensor = torch.Tensor


class Captured(Protocol):
    """A recorded sequence of launches."""

    def replay(self) -> None:
        """Launch them again, on the same memory."""


def capture(device: torch.device, run: Callable[[], Tensor]) -> tuple[Captured, Tensor]:
    """The launches of run() on a GPU and the tensor that holds its result after each replay. Raises RuntimeError."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run()
    return graph, result


Make = Callable[[Callable[[], Tensor]], tuple[Captured, Tensor]]
"""Captures what it is given to call."""


class Decoder:
    """One sequence at a time: `cache` holds its keys and values, step() appends a token.

    graphs: those of a CausalLM. room: tokens the cache holds, at least 2. make: what captures launches; None for none.
    """

    def __init__(self, graphs: dict[str, BoundGraph], room: int, make: Make | None) -> None:
        self.room = room
        self.cache = KVCache(graphs["prefill"], room)
        self._graph, self._make = graphs["decode"], make
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=self._graph.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=self._graph.device)
        self._steps = 0
        self._captured: tuple[Captured, Tensor] | None = None

    def clear(self) -> None:
        """Forget the sequence, so that the next one gives the same bits as with a new cache."""
        for tensor in self.cache.tensors:
            tensor.zero_()

    def step(self, token: Tensor, position: int) -> Tensor:
        """Logits (1, 1, vocab) after `token` int64 (1, 1), which becomes number `position` of the sequence.

        The next step overwrites them.
        """
        self._token.copy_(token)
        self._position.fill_(position)
        self._steps += 1
        if self._captured is None and self._make is not None and self._steps > WARM_STEPS:
            self._captured = self._try(self._make)
        if self._captured is None:
            return self._run()
        graph, logits = self._captured
        graph.replay()
        return logits

    def _run(self) -> Tensor:
        return self._graph.call(self._token, self._position, *self.cache.tensors)  # type: ignore[return-value]

    def _try(self, make: Make) -> tuple[Captured, Tensor] | None:
        try:
            return make(self._run)
        except RuntimeError as error:
            self._make = None
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            warnings.warn(
                f"decoding goes on without a CUDA graph, which is slower: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None


class Decoders:
    """The decoder of a model that waits for the next sequence of its length; at most one, made when asked for."""

    def __init__(self, graphs: dict[str, BoundGraph], device: torch.device, captures: bool) -> None:
        self._graphs, self._on_gpu = graphs, device.type == "cuda"
        self._make = partial(capture, device) if captures and self._on_gpu else None
        self._waiting: list[Decoder] = []

    def take(self, room: int, most: int) -> Decoder:
        """One with an empty cache for `room` tokens, on a GPU for up to ROOM_MULTIPLE - 1 more, but not over `most`.

        Nobody else has it until give_back(). The one that waits is dropped where it does not fit.
        """
        room = max(2, room)
        if self._on_gpu:
            room = max(room, min(-(-room // ROOM_MULTIPLE) * ROOM_MULTIPLE, most))
        try:
            decoder = self._waiting.pop()
        except IndexError:
            return Decoder(self._graphs, room, self._make)
        if decoder.room != room:
            del decoder  # its memory first
            return Decoder(self._graphs, room, self._make)
        decoder.clear()
        return decoder

    def give_back(self, decoder: Decoder) -> None:
        """Let the next sequence have it."""
        if self._make is not None:
            self._waiting[:] = [decoder]
