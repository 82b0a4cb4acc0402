"""CPU back end of the encoder: the beam search as a TVM kernel for the local processor (TIR -> LLVM).

One vector at a time: the beam is costs and packed signs in contiguous rows, processed 16 prefixes at a time
(AVX-512; 8 on other processors). A lookup of sixteen signs is four in-register permutes. The `beam` cheapest
children are found by counting below three pivots at a time, and compacted in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from liftc import env
from liftc.errors import QuantizeError

if TYPE_CHECKING:
    from liftc.quant.encode import Prepared

_STATIC_BEAMS = (16, 64, 128)
_ROWS_PER_TASK = 128
_lock = threading.Lock()


def search_llvm(targets: torch.Tensor, prepared: Prepared, beam: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode.search` on the CPU: targets (B, D) -> signs int8 (B, D), cost float32 (B,).

    Threads: `env.num_threads()`, each taking the next task of 128 rows; the result does not depend on them.
    Raises QuantizeError when TVM is not installed.
    """
    rows, big = targets.shape
    targets = targets.contiguous()
    signs = torch.empty(rows, big, dtype=torch.int8)
    cost = torch.empty(rows)
    bits = cost.view(torch.int32)
    if rows == 0:
        return signs, cost
    with _lock:
        kernel = _kernel(beam if beam in _STATIC_BEAMS else 0)
    table, diagonal = prepared.table.view(-1), prepared.diagonal
    stride = -(-beam // 16) * 16 + 16
    scratch_size = (2 * (-(-big // 32) + 1) + 2) * stride

    def run(starts: list[int]) -> None:
        scratch = torch.empty(scratch_size, dtype=torch.int32)
        while starts:
            try:
                first = starts.pop()
            except IndexError:  # another thread took the last one
                return
            part = slice(first, min(first + _ROWS_PER_TASK, rows))
            kernel(
                targets[part].view(-1), table, diagonal, signs[part].view(-1), bits[part], scratch,
                big, beam, part.stop - first,
            )  # fmt: skip

    starts = list(range(0, rows, _ROWS_PER_TASK))[::-1]
    threads = min(env.num_threads(), len(starts))
    if threads == 1:
        run(starts)
        return signs, cost
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(run, starts) for _ in range(threads)]:
            done.result()
    return signs, cost


@lru_cache(maxsize=16)
def _kernel(beam: int) -> Callable[..., None]:
    try:
        from liftc.quant import beam_llvm_kernel
    except ImportError as error:
        raise QuantizeError(
            "encode: compiling the encoder for the CPU needs TVM; install it with pip install 'liftc[quantize]'"
        ) from error
    return beam_llvm_kernel.build(beam)
