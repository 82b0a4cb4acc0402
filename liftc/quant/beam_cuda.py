"""CUDA back end of the encoder: builds, caches and calls the kernels of `beam_cuda_kernel`.

TVM writes one CUDA source per width of the packed signs, nvcc compiles it for the architecture of the GPU,
and tvm_ffi loads the result. The object is kept in `env.cache_dir()` under a name that hashes the generator,
so a machine that holds it needs neither TVM nor nvcc.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from liftc import env
from liftc.errors import QuantizeError

if TYPE_CHECKING:
    from liftc.quant.encode import Prepared

SHAPES = ((1, 1), (1, 2), (1, 4), (2, 4), (4, 4), (8, 4), (16, 4), (32, 4))
"""(warps per vector, prefixes per thread) of the kernels; one holds a beam of up to 32 * warps * prefixes."""

WORDS = (4, 8)
"""Words of packed signs per prefix: D <= 128 and D <= 256."""

_ROWS_PER_CALL = 1 << 20


def search_cuda(targets: torch.Tensor, prepared: Prepared, beam: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode.search` on the GPU: targets (B, D) -> signs int8 (B, D), cost float32 (B,), on its stream.

    Raises QuantizeError when the kernels have to be built and TVM or nvcc is missing.
    """
    rows, big = targets.shape
    targets = targets.contiguous()
    signs = torch.empty(rows, big, dtype=torch.int8, device=targets.device)
    cost = torch.empty(rows, dtype=torch.float32, device=targets.device)
    if rows == 0:
        return signs, cost
    words = next(w for w in WORDS if big <= 32 * w)
    warps, entries = next(shape for shape in SHAPES if beam <= 32 * shape[0] * shape[1])
    with torch.cuda.device(targets.device):
        major, minor = torch.cuda.get_device_capability()
        kernel = _kernel(words, f"sm_{major}{minor}", kernel_name(warps, entries, words))
        table, diagonal = prepared.table.view(-1), prepared.diagonal
        for first in range(0, rows, _ROWS_PER_CALL):
            part = slice(first, min(first + _ROWS_PER_CALL, rows))
            kernel(
                targets[part].view(-1), table, diagonal, signs[part].view(-1), cost[part],
                big, beam, part.stop - first,
            )  # fmt: skip
    return signs, cost


def kernel_name(warps: int, entries: int, words: int) -> str:
    return f"beam_search_{warps}x{entries}_w{words}"


def library_path(words: int, arch: str) -> Path:
    """Where the object for `arch` ("sm_90") is cached; the name changes when the generator does."""
    text = Path(__file__).with_name("beam_cuda_kernel.py").read_bytes() + Path(__file__).read_bytes()
    return env.cache_dir() / f"beam-{words}-{arch}-{hashlib.sha256(text).hexdigest()[:12]}.so"


def build_library(words: int, arch: str) -> Path:
    """Generate and compile all kernels of one width for `arch`, unless cached; no GPU is needed.

    Raises QuantizeError when TVM or nvcc is missing or nvcc fails.
    """
    path = library_path(words, arch)
    if path.is_file():
        return path
    code = kernel_source(words)
    nvcc = _nvcc()
    path.parent.mkdir(parents=True, exist_ok=True)
    import tvm_ffi.libinfo

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        (Path(folder) / "beam.cu").write_text(code)
        compute = arch.replace("sm_", "compute_")
        command = [
            nvcc, "-shared", "-O3", "-std=c++17", "-w", "-Xcompiler=-fPIC", "-cudart=static",
            *(f"-I{include}" for include in tvm_ffi.libinfo.include_paths()),
            "-gencode", f"arch={compute},code={arch}", "beam.cu", "-o", "beam.so",
            f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi",
        ]  # fmt: skip
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if result.returncode:
            message = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
            raise QuantizeError(f"encode: nvcc could not build the encoder for {arch}: {message[0]}")
        os.replace(Path(folder) / "beam.so", path)
    return path


def kernel_source(words: int) -> str:
    """The CUDA C++ file of all kernels of one width; raises QuantizeError when TVM is not installed."""
    try:
        from liftc.quant import beam_cuda_kernel
    except ImportError as error:
        raise QuantizeError(
            "encode: building the encoder for the GPU needs TVM; run pip install 'liftc[quantize]'"
        ) from error
    return beam_cuda_kernel.source([(kernel_name(w, e, words), w, e, words) for w, e in SHAPES])


@lru_cache(maxsize=64)
def _kernel(words: int, arch: str, name: str) -> Callable[..., None]:
    import tvm_ffi

    kernel: Callable[..., None] = tvm_ffi.load_module(str(build_library(words, arch)))[name]
    return kernel


def _nvcc() -> str:
    home = env.cuda_home()
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places = [home / "bin" / "nvcc"] if home is not None else []
    places += [Path("/usr/local/cuda/bin/nvcc"), *sorted(packages.glob("cu[0-9]*/bin/nvcc"), reverse=True)]
    if home is None and (found := shutil.which("nvcc")):
        return found
    for place in places:
        if place.is_file():
            return str(place)
    raise QuantizeError(
        "encode: building the encoder for the GPU needs nvcc; run pip install 'liftc[cuda]' or set CUDA_HOME"
    )
