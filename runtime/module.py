"""Models made of bound graphs: CausalLM (prefill + decode) and GraphModel (one forward graph)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from liftc import env
from liftc.errors import LiftcError
from liftc.runtime.decoding import Decoders
from liftc.runtime.executor import BoundGraph, KVCache
from liftc.runtime.sampling import Sampling


class GraphModel(nn.Module):
    """A module with one graph, "forward". Inputs and outputs are those of the captured module.

    tensors: name -> tensor, shared with the graphs. config: the Hugging Face config, or {}.
    """

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.config = dict(config)
        self.device = device
        self.graphs = {name: BoundGraph(graph, tensors, device) for name, graph in graphs.items()}
        for index, tensor in enumerate(tensors.values()):
            self.register_buffer(f"tensor_{index}", tensor, persistent=False)

    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> Any:
        """Run the forward graph on inputs in its order or by name, as in `model(input_ids, attention_mask=mask)`.

        Inputs go to the model's device. Raises LiftcError for one that is missing, unknown or given twice.
        """
        graph = self.graphs["forward"]
        given = {**dict(zip(graph.inputs, inputs)), **named}
        if len(given) != len(inputs) + len(named) or set(given) != set(graph.inputs):
            told = f"{len(inputs)} in order" + (f" and {sorted(named)} by name" if named else "")
            raise LiftcError(f"this model takes the inputs {list(graph.inputs)}, each once; got {told}")
        return graph.call(*(given[name].to(self.device) for name in graph.inputs))


class CausalLM(GraphModel):
    """A causal language model: `model(input_ids)` gives logits, `model.generate(...)` gives tokens.

    On a GPU the KV cache of the last sequence and a CUDA graph of its decoding are kept for the next one of that length
    (runtime/decoding.py) unless LIFTC_CUDA_GRAPH is 0.
    """

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        super().__init__(graphs, tensors, config, device)
        self._decoders = Decoders(self.graphs, device, env.cuda_graph())

    @property
    def max_length(self) -> int:
        """Longest sequence the model was trained for (config max_position_embeddings), in tokens."""
        return int(self.config.get("max_position_embeddings") or self.config.get("n_positions") or 2048)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """End-of-sequence ids of the config."""
        value = self.config.get("eos_token_id")
        values: Iterable[Any] = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(int(v) for v in values if v is not None)

    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        """Logits of every position: input_ids int64 (T,) or (1, T) -> (1, T, vocab) in the model's dtype."""
        if len(inputs) + len(named) != 1 or named.keys() - {"input_ids"}:
            raise LiftcError("this model takes input_ids, and nothing else; it keeps masks and caches itself")
        ids = self._ids(*inputs, *named.values())
        cache = KVCache(self.graphs["prefill"], max(2, ids.shape[1]))
        return self._prefill(ids, torch.arange(ids.shape[1], device=self.device), cache)

    def generate(
        self,
        input_ids: torch.Tensor | Sequence[int],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_tokens: Sequence[int] | None = None,
        context_length: int | None = None,
    ) -> torch.Tensor:
        """Prompt and continuation, int64 (1, T + new). Arguments as in `stream`."""
        ids = self._ids(torch.as_tensor(input_ids, dtype=torch.int64))
        new = list(
            self.stream(
                ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                stop_tokens=stop_tokens, context_length=context_length,
            )
        )  # fmt: skip
        return torch.cat([ids, torch.tensor([new], dtype=torch.int64, device=self.device)], 1)

    @torch.no_grad()
    def stream(
        self,
        input_ids: torch.Tensor | Sequence[int],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_tokens: Sequence[int] | None = None,
        context_length: int | None = None,
    ) -> Iterator[int]:
        """Yield token ids one by one.

        input_ids: (T,) or (1, T) with T >= 1. temperature 0 is greedy; top_k 0 and top_p 1 are off.
        stop_tokens: ids that end the text (None: the config's end-of-sequence ids; they are yielded).
        context_length: tokens the KV cache holds (None: prompt + max_new_tokens). Raises LiftcError when the
        prompt is empty or does not fit.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        ids = self._ids(torch.as_tensor(input_ids, dtype=torch.int64))
        length = ids.shape[1]
        if max_new_tokens < 0:
            raise LiftcError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
        room = context_length if context_length is not None else length + max_new_tokens
        room = min(room, self.max_length)
        if length >= room and max_new_tokens:
            raise LiftcError(f"the prompt has {length} tokens, which leaves no room in a context of {room}")
        stops = set(self.stop_tokens if stop_tokens is None else stop_tokens)
        generator = sampling.generator(self.device)
        if not max_new_tokens:
            return
        decoder = self._decoders.take(room, self.max_length)
        try:
            logits = self._prefill(ids, torch.tensor([length - 1], device=self.device), decoder.cache)
            count = min(max_new_tokens, room - length)
            for position in range(length, length + count):
                token = sampling.next_token(logits[:, -1], generator)
                value = int(token)
                yield value
                if value in stops or position == length + count - 1:
                    return
                logits = decoder.step(token, position)
        finally:
            self._decoders.give_back(decoder)

    def _prefill(self, ids: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if ids.shape[1] == 1:
            where = torch.zeros(1, dtype=torch.int64, device=self.device)
            return self.graphs["decode"].call(ids, where, *cache.tensors)  # type: ignore[return-value]
        where = torch.arange(ids.shape[1], device=self.device)
        return self.graphs["prefill"].call(ids, where, positions, *cache.tensors)  # type: ignore[return-value]

    def _ids(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(self.device)
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 1 or ids.dtype != torch.int64:
            raise LiftcError(
                f"input_ids must be int64 of shape (T,) or (1, T) with T >= 1, got {tuple(ids.shape)}"
            )
        vocab = self.config.get("vocab_size")
        if vocab is not None and (int(ids.min()) < 0 or int(ids.max()) >= int(vocab)):
            raise LiftcError(f"input_ids must lie in [0, {vocab}), got values up to {int(ids.max())}")
        return ids.contiguous()
