"""The CUDA beam search: its generated source run thread by thread on the CPU, and the real thing on a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from liftc.errors import QuantizeError
from liftc.quant import beam_cuda, beam_cuda_kernel
from liftc.quant.encode import prepare, project, search, search_reference

EMULATOR = Path(__file__).with_name("cuda_emulator.h")

LAUNCH = """
static float *best, *diagonal, *table, *targets;
static signed char* signs;
static int big, beam, rows;
static void run_kernel() { beam_search_kernel(best, diagonal, signs, table, targets, big, beam, rows); }
extern "C" void run(float* b, float* d, signed char* s, float* t, float* c, int D, int k, int n) {
  best = b; diagonal = d; signs = s; table = t; targets = c; big = D; beam = k; rows = n;
  emulator::launch((rows + VECTORS - 1) / VECTORS, THREADS, SHARED, run_kernel);
}
"""


def emulated(warps: int, entries: int, words: int, folder: Path) -> Callable[..., None]:
    """The kernel's device code compiled by g++ against the emulator."""
    source = beam_cuda_kernel.source([("beam_search", warps, entries, words)])
    found = re.search(r'extern "C" __global__ [^;{]*\{.*?\n\}\n', source, re.S)
    assert found, "the generated file holds no kernel definition"
    kernel, replaced = re.subn(
        r"extern __shared__ .*?;", "uchar* pool_buf_ptr = shared_memory.data();", found[0]
    )
    assert replaced == 1
    vectors = 4 if warps == 1 else 1
    sizes = {
        "VECTORS": vectors, "THREADS": vectors * warps * 32,
        "SHARED": 4 * (vectors * 32 * warps * entries * (1 + words) + 4 * warps),
    }  # fmt: skip
    launch = LAUNCH
    for name, value in sizes.items():
        launch = launch.replace(name, str(value))
    (folder / "kernel.cpp").write_text(f'#include "{EMULATOR}"\n{kernel}{launch}')
    command = [
        "g++",
        "-O1",
        "-std=c++17",
        "-w",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        "kernel.cpp",
        "-o",
        "kernel.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    run = ctypes.CDLL(str(folder / "kernel.so")).run

    def call(*arguments: torch.Tensor | int) -> None:
        run(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))

    return call


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("warps", "entries", "words", "cases"),
    [(1, 1, 4, [(9, 4, 3), (40, 16, 32)]), (1, 2, 4, [(77, 32, 64), (33, 20, 40)]), (2, 4, 4, [(20, 8, 200)]),
     (1, 2, 8, [(140, 60, 48)])],
)  # fmt: skip
def test_generated_source_equals_reference(
    warps: int, entries: int, words: int, cases: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    run = emulated(warps, entries, words, tmp_path)
    for big, d, beam in cases:
        prepared = prepare(torch.linalg.qr(gaussian(big, d))[0].T.contiguous())
        w = gaussian(6 if warps == 1 else 3, d, seed=1)
        w[1] = 0  # ties at every level
        targets = project(w, prepared, beam)
        signs, cost = torch.zeros(len(w), big, dtype=torch.int8), torch.zeros(len(w))
        run(cost, prepared.diagonal, signs, prepared.table, targets, big, beam, len(w))
        expected, least = search_reference(targets, prepared, beam)
        assert torch.equal(signs, expected) and torch.equal(cost, least)


def test_kernels_cover_every_beam_and_width() -> None:
    capacities = [32 * warps * entries for warps, entries in beam_cuda.SHAPES]
    assert capacities == sorted(capacities) and capacities[-1] == 4096
    assert beam_cuda.WORDS == (4, 8)


def test_source_is_plain_text_of_all_kernels() -> None:
    source = beam_cuda.kernel_source(4)
    for warps, entries in beam_cuda.SHAPES:
        assert f"__tvm_ffi_{beam_cuda.kernel_name(warps, entries, 4)}" in source


def test_missing_nvcc_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(beam_cuda.Path, "is_file", lambda path: False)
    monkeypatch.setattr(beam_cuda, "kernel_source", lambda words: "")
    with pytest.raises(QuantizeError, match="needs nvcc") as caught:
        beam_cuda.build_library(4, "sm_90")
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("big", "d", "beam"), [(9, 4, 3), (77, 32, 64), (77, 32, 300), (128, 64, 1024), (154, 64, 64)]
)
def test_gpu_equals_reference(big: int, d: int, beam: int) -> None:
    prepared = prepare(torch.linalg.qr(gaussian(big, d))[0].T.contiguous().cuda())
    targets = project(gaussian(40, d, seed=1).cuda(), prepared, beam)
    signs, cost = search(targets, prepared, beam)
    expected, least = search_reference(targets, prepared, beam)
    assert torch.equal(signs, expected) and torch.equal(cost, least)
