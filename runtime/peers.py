"""What lifted linears are compared with: dense products, signs unpacked by torch, and other people's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

Tensor = torch.Tensor

PACKAGES = ("gemlite", "torchao", "vllm", "bitsandbytes")
"""Packages with kernels for a few bits per weight that may be installed."""

_INT4_GROUP = 128
_GEMLITE_GROUP = 64
_BYTES = 300_000_000
"""Distinct weights of a peer per timing; more than any cache holds."""


@dataclass(frozen=True)
class Peer:
    """A linear of the same size by other means. run() is `count` of them on different weights of `weight_bytes`."""

    name: str
    run: Callable[[], Any]
    count: int
    weight_bytes: int


def missing() -> list[str]:
    """Packages of PACKAGES that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def peers(rows: int, features: int, tokens: int, pool: Tensor) -> Iterator[Callable[[], Peer]]:
    """Makers of the peers that this device has; each may raise, as other people's code does.

    pool: int32 words from which weights are taken, so that making them costs no time.
    """
    if pool.device.type != "cuda":
        yield lambda: _dense("torch.linear.float32", torch.float32, rows, features, tokens, pool)
        yield lambda: _dense("torch.linear.bfloat16", torch.bfloat16, rows, features, tokens, pool)
        return
    yield lambda: _dense("cublas.float16", torch.float16, rows, features, tokens, pool)
    if tokens <= 16:
        yield lambda: _int4(rows, features, tokens, pool)
        if find_spec("gemlite") is not None:
            yield lambda: _gemlite(rows, features, tokens, pool)


def _dense(name: str, dtype: torch.dtype, rows: int, features: int, tokens: int, pool: Tensor) -> Peer:
    size = rows * features * dtype.itemsize
    count = max(1, min(pool.nbytes // size, -(-_BYTES // size), 512))
    generator = torch.Generator(pool.device).manual_seed(
        0
    )  # how fast a GPU runs depends on what it multiplies
    weights, x = (
        torch.randn(shape, dtype=dtype, device=pool.device, generator=generator)
        for shape in ((count, rows, features), (tokens, features))
    )

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    return Peer(name, run, count, size)


def _int4(rows: int, features: int, tokens: int, pool: Tensor) -> Peer:
    """torch's own 4-bit product (tinygemm), groups of 128 weights with a scale and a zero each."""
    size = rows * features // 2
    count = max(1, min(-(-_BYTES // size), 64))
    device = pool.device
    weights = []
    for index in range(count):
        start = index * size // 4 % max(1, pool.numel() - size // 4)
        signs = pool[start : start + size // 4].view(torch.uint8).view(rows, features // 2)
        weights.append(torch._convert_weight_to_int4pack(signs, 8))
    x = torch.ones(tokens, features, dtype=torch.bfloat16, device=device)
    scales = torch.ones(features // _INT4_GROUP, rows, 2, dtype=torch.bfloat16, device=device)

    def run() -> None:
        for weight in weights:
            torch._weight_int4pack_mm(x, weight, _INT4_GROUP, scales)

    return Peer("torch.int4", run, count, size)


def _gemlite(rows: int, features: int, tokens: int, pool: Tensor) -> Peer:
    """GemLite's 2-bit product, groups of 64."""
    size = rows * features // 4
    count = max(1, min(-(-_BYTES // size), 16))
    device = pool.device
    maker = import_module("gemlite.helper").A16Wn(device=str(device), dtype=torch.float16)
    groups = rows * features // _GEMLITE_GROUP
    scales = torch.ones(groups, 1, dtype=torch.float16, device=device)
    layers = []
    for index in range(count):
        levels = pool[index : index + rows * features // 4].view(torch.uint8).view(rows, features) & 3
        layers.append(maker.from_weights(levels, scales, scales, 2, _GEMLITE_GROUP))
    x = torch.ones(tokens, features, dtype=torch.float16, device=device)

    def run() -> None:
        for layer in layers:
            layer(x)

    return Peer("gemlite.int2", run, count, size)


def unpack_and_multiply(unpack: Callable[[], Tensor], z: Tensor) -> Callable[[], Any]:
    """Plain PyTorch: the signs as a matrix in memory, then a dense product."""
    return lambda: torch.nn.functional.linear(z, unpack())


def torch_unpacker(packed: Tensor, rows: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Signs of packed int32 (G, K) by shifts and masks of torch, -1 and +1."""
    shifts: Sequence[int] = range(32)
    places = torch.tensor(list(shifts), dtype=torch.int32, device=packed.device)[None, :, None]

    def unpack() -> Tensor:
        bits = (packed[:, None, :] >> places) & 1
        return (bits.view(-1, packed.shape[1])[:rows] * 2 - 1).to(dtype)

    return unpack
