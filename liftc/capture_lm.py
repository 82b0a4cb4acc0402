"""Export of a Hugging Face causal language model: prefill and decode graphs with an explicit KV cache.

    prefill(input_ids i64[1,t], cache_position i64[t], logit_positions i64[n], k_cache_*, v_cache_*)
        -> logits [1,n,vocab]
    decode(input_ids i64[1,1], cache_position i64[1], k_cache_*, v_cache_*) -> logits [1,1,vocab]

k_cache_i and v_cache_i are [1, kv_heads, s, head_dim] and are written in place at `cache_position`. All of
t, n and s are dynamic. Attention reads all s rows of the cache; the mask hides what is not written yet.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from liftc.capture_export import export_quietly
from liftc.errors import CaptureError

SDPA = "liftc_sdpa"
"""Name under which `sdpa_attention` is registered with transformers."""

_EXAMPLE_TOKENS, _EXAMPLE_LOGITS, _EXAMPLE_CACHE = 7, 3, 19


class AttentionUnsupported(ValueError):
    """This model's attention needs something that scaled_dot_product_attention lacks; use eager instead."""


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **extra: object,
) -> tuple[torch.Tensor, None]:
    """Grouped-query attention over the whole cache, always with an explicit mask.

    query: (b, heads, q, head_dim); key, value: (b, kv_heads, s, head_dim); mask: bool (b, 1, q, s).
    Returns (b, q, heads, head_dim). A single query is folded into the group dimension, so that one token
    costs one pass over the cache and no copy of it.
    """
    needed = {"softcap", "s_aux", "sinks", "position_bias"} & {k for k, v in extra.items() if v is not None}
    if needed or attention_mask is None:
        raise AttentionUnsupported(f"sdpa attention does not cover {', '.join(sorted(needed)) or 'no mask'}")
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    if groups > 1 and isinstance(length, int) and length == 1:
        query = query.reshape(query.shape[0], key.shape[1], groups, query.shape[3])
    elif groups > 1:
        key, value = _repeat_heads(key, groups), _repeat_heads(value, groups)
    result = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    result = result.reshape(result.shape[0], -1, length, value.shape[-1])
    return result.transpose(1, 2).contiguous(), None


def _repeat_heads(states: torch.Tensor, groups: int) -> torch.Tensor:
    """(b, kv_heads, s, head_dim) -> (b, kv_heads * groups, s, head_dim), each head `groups` times."""
    batch, heads, length, size = states.shape
    spread = states[:, :, None].expand(batch, heads, groups, length, size)
    return spread.reshape(batch, heads * groups, length, size)


def _explicit_mask(**arguments: Any) -> torch.Tensor | None:
    """transformers' boolean mask, never skipped in favour of an is_causal flag."""
    options = {**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: torch.Tensor | None = sdpa_mask(**options)
    return mask


AttentionInterface.register(SDPA, sdpa_attention)
AttentionMaskInterface.register(SDPA, _explicit_mask)


@dataclass(frozen=True)
class CacheShape:
    """Key and value heads and sizes of one layer's cache."""

    key: tuple[int, int]
    value: tuple[int, int]


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's cache: given tensors written at `position`, or (before capture) a recorder of shapes."""

    is_compileable = True
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.position: torch.Tensor | None = None
        self.shape: CacheShape | None = None
        self.is_initialized = True

    def bind(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        self.keys, self.values, self.position = keys, values, position

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the tensors are given."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.position is None:
            self.shape = CacheShape(_heads_and_size(key_states), _heads_and_size(value_states))
            return key_states, value_states
        keys = self.keys.index_copy_(2, self.position, key_states)
        return keys, self.values.index_copy_(2, self.position, value_states)

    def get_seq_length(self) -> Any:
        return 0 if self.position is None else self.position[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length if self.position is None else self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return -1 if self.position is None else self.keys.shape[2]


def _heads_and_size(states: torch.Tensor) -> tuple[int, int]:
    return int(states.shape[1]), int(states.shape[3])


class _LanguageModel(nn.Module):
    """The wrapper that is exported: cache as flat inputs, logits at chosen positions only."""

    def __init__(self, hf: PreTrainedModel, cached_layers: list[int]) -> None:
        super().__init__()
        self.hf = hf
        self.cached_layers = cached_layers

    def run(
        self,
        input_ids: torch.Tensor,
        cache_position: torch.Tensor,
        k_cache: list[torch.Tensor],
        v_cache: list[torch.Tensor],
        **extra: Any,
    ) -> torch.Tensor:
        layers = [_Layer() for _ in range(max(self.cached_layers) + 1)]
        for layer in layers:  # a layer without a cache still answers for position and length
            layer.bind(k_cache[0], v_cache[0], cache_position)
        for index, keys, values in zip(self.cached_layers, k_cache, v_cache):
            layers[index].bind(keys, values, cache_position)
        output = self.hf(
            input_ids=input_ids,
            position_ids=cache_position[None],
            past_key_values=Cache(layers=layers),
            use_cache=True,
            **extra,
        )
        logits: torch.Tensor = output.logits
        return logits


class _Prefill(_LanguageModel):
    def forward(
        self,
        input_ids: torch.Tensor,
        cache_position: torch.Tensor,
        logit_positions: torch.Tensor,
        k_cache: list[torch.Tensor],
        v_cache: list[torch.Tensor],
    ) -> torch.Tensor:
        return self.run(input_ids, cache_position, k_cache, v_cache, logits_to_keep=logit_positions)


class _Decode(_LanguageModel):
    def forward(
        self,
        input_ids: torch.Tensor,
        cache_position: torch.Tensor,
        k_cache: list[torch.Tensor],
        v_cache: list[torch.Tensor],
    ) -> torch.Tensor:
        return self.run(input_ids, cache_position, k_cache, v_cache)


def record_cache_shapes(hf: PreTrainedModel, fake_mode: FakeTensorMode) -> dict[int, CacheShape]:
    """Run the model once on fake tensors and see what each layer puts into its cache: layer -> shapes."""
    accepted = inspect.signature(hf.forward).parameters
    if missing := {"position_ids", "past_key_values", "logits_to_keep"} - set(accepted):
        raise CaptureError(f"{type(hf).__name__} does not take {', '.join(sorted(missing))}")
    layers = [_Layer() for _ in range(hf.config.num_hidden_layers)]
    with fake_mode, torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.int64)
        hf(
            input_ids=ids,
            position_ids=torch.arange(2)[None],
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
    shapes = {index: layer.shape for index, layer in enumerate(layers) if layer.shape is not None}
    if not shapes:
        raise CaptureError(f"{type(hf).__name__} keeps no key-value cache")
    return shapes


def export_language_model(
    hf: PreTrainedModel, shapes: dict[int, CacheShape], dtype: torch.dtype
) -> dict[str, ExportedProgram]:
    """Export "prefill" and "decode"; `hf` holds fake weights. The wrapper's attribute prefix is "hf"."""
    s, t, n = Dim("s", min=2), Dim("t", min=1), Dim("n", min=1)
    k_cache = [torch.zeros(1, c.key[0], _EXAMPLE_CACHE, c.key[1], dtype=dtype) for c in shapes.values()]
    v_cache = [torch.zeros(1, c.value[0], _EXAMPLE_CACHE, c.value[1], dtype=dtype) for c in shapes.values()]
    cache_dims = [{2: s} for _ in shapes]
    layers = list(shapes)
    ids, positions = torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64), torch.arange(_EXAMPLE_TOKENS)
    prefill = export_quietly(
        _Prefill(hf, layers).eval(),
        (ids, positions, torch.arange(_EXAMPLE_LOGITS), k_cache, v_cache),
        ({1: t}, {0: t}, {0: n}, cache_dims, cache_dims),
    )
    decode = export_quietly(
        _Decode(hf, layers).eval(),
        (ids[:, :1].contiguous(), positions[:1].contiguous(), k_cache, v_cache),
        ({}, {}, cache_dims, cache_dims),
    )
    return {"prefill": prefill, "decode": decode}
