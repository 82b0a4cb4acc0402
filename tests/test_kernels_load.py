"""Loading kernel objects: without TVM, with threads and after a fork, on the wrong machine, damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from liftc.errors import ArtifactError, TargetError
from liftc.kernel_object import KernelFunction, read_kernel_object
from liftc.runtime.kernels import OLDEST_CUDA_KERNELS, launchable, load_kernels, runs_on

pytest.importorskip("tvm", reason="kernels are built with TVM")
from built_kernels import cpu_object

from liftc.codegen.build import native_cpu_level
from liftc.codegen.library import KERNEL_VERSION

CPU = torch.device("cpu")


@pytest.fixture
def native() -> Path:
    return cpu_object(native_cpu_level())


FRESH = """
import os, sys
sys.modules["tvm"] = None
from pathlib import Path
import torch
from liftc import ir, reference
from liftc.packing import pack_signs
from liftc.runtime.kernels import load_kernels
from liftc.runtime.ops import register

kernels = load_kernels(Path(sys.argv[1]), torch.device("cpu"))
kernels.library.liftc_use_openmp(int(sys.argv[2]))
assert kernels.set_num_threads(2) == 2
register(kernels)
g = torch.Generator().manual_seed(1)
z = torch.randint(-16383, 16384, (1, 5, 513), generator=g).to(torch.int16)
operands = z, torch.rand(1, 5, 1, generator=g), pack_signs(torch.randn(1000, 513, generator=g)), torch.rand(1000)
want = reference.sign_matmul(*operands, torch.float32)

def check(times=50):
    return all(torch.equal(ir.sign_matmul(*operands, torch.float32), want) for _ in range(times))

assert check()
"""


def run_fresh(native: Path, openmp: int, more: str) -> None:
    script = FRESH + textwrap.dedent(more)
    result = subprocess.run(
        [sys.executable, "-c", script, str(native), str(openmp)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("openmp", [0, 1])
def test_fresh_process_without_tvm_with_python_threads_and_fork(native: Path, openmp: int) -> None:
    run_fresh(
        native,
        openmp,
        """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda _: check(), range(4)))
        child = os.fork()
        if child == 0:
            os._exit(0 if check(5) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert check()
        for threads in (1, 7, 300, 2):
            kernels.set_num_threads(threads)
            assert check(5)
        """,
    )


def test_kernels_of_another_device_are_refused(native: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="built for cpu, the device is cuda"):
        load_kernels(native, torch.device("cuda"))
    with pytest.raises(TargetError, match="built for cpu, the device is meta: use device cpu or cuda"):
        load_kernels(native, torch.device("meta"))


def edited(native: Path, folder: Path, **changes: object) -> Path:
    """A copy of the object whose descriptor has other values."""
    path = folder / native.name
    shutil.copyfile(native, path)
    record = json.loads(native.with_suffix(".json").read_text()) | changes
    path.with_suffix(".json").write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))
    return path


def test_missing_cpu_features_are_named_before_the_code_is_opened(native: Path, tmp_path: Path) -> None:
    path = edited(native, tmp_path, features=["sse4_2", "avx1024"])
    with pytest.raises(TargetError, match="need the CPU features avx1024, which this machine lacks"):
        load_kernels(path, CPU)


def test_cuda_kernels_with_other_arguments_are_refused(native: Path, tmp_path: Path) -> None:
    assert OLDEST_CUDA_KERNELS <= KERNEL_VERSION
    changes = {"target": "cuda", "archs": ["sm_89"], "ptx": "", "features": []}
    path = edited(native, tmp_path, kernel_version=OLDEST_CUDA_KERNELS - 1, **changes)
    oldest = OLDEST_CUDA_KERNELS
    said = f"are of version {oldest - 1}, this liftc calls version {oldest} and .*: compile again"
    with pytest.raises(ArtifactError, match=said):
        load_kernels(path, torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_object_without_a_gpu_names_the_cpu_object(native: Path, tmp_path: Path) -> None:
    changes = {"target": "cuda", "archs": ["sm_89"], "ptx": "compute_89", "features": []}
    path = edited(native, tmp_path, **changes)
    with pytest.raises(
        TargetError, match=f"torch finds none on this machine: load on device cpu.*{native.name}"
    ):
        load_kernels(path, torch.device("cuda"))
    (tmp_path / "other").mkdir()
    alone = path.rename(tmp_path / "other" / "k.so")
    path.with_suffix(".json").rename(alone.with_suffix(".json"))
    record = json.loads(alone.with_suffix(".json").read_text()) | {"path": "k.so"}
    alone.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(TargetError, match="compile with --target llvm"):
        load_kernels(alone, torch.device("cuda"))


@pytest.mark.parametrize(
    "archs, ptx, capability, runs",
    [
        (("sm_80",), "", (8, 9), True), (("sm_89",), "", (8, 6), False), (("sm_89",), "", (9, 0), False),
        (("sm_90a",), "", (9, 0), True), (("sm_90a",), "", (10, 0), False), (("sm_100a",), "", (10, 3), False),
        (("sm_80",), "compute_80", (12, 0), True), (("sm_120",), "compute_120", (9, 0), False),
        (("sm_100",), "", (10, 3), True), (("sm_90",), "", (10, 0), False),
    ],
)  # fmt: skip
def test_which_gpus_an_object_runs_on(
    native: Path, tmp_path: Path, archs: tuple[str, ...], ptx: str, capability: tuple[int, int], runs: bool
) -> None:
    path = edited(native, tmp_path, target="cuda", archs=list(archs), ptx=ptx)
    assert runs_on(read_kernel_object(path), capability) is runs


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        ("", (10, 0), True), ("sm_90a", (9, 0), True), ("sm_90a", (10, 0), False), ("sm_90", (10, 0), True),
        ("sm_90", (8, 9), False),
    ],
)  # fmt: skip
def test_functions_for_a_chip_with_the_letter_a_have_no_ptx(
    native: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    archs: str,
    capability: tuple[int, int],
    runs: bool,
) -> None:
    path = edited(native, tmp_path, target="cuda", archs=["sm_90", "sm_90a"], ptx="compute_90")
    gpu = SimpleNamespace(major=capability[0], minor=capability[1], shared_memory_per_block_optin=1 << 17)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    function = KernelFunction("f", "sign_matmul_tiled", "", archs=archs, shared_bytes=1 << 16)
    assert launchable(function, read_kernel_object(path), torch.device("cuda")) is runs
    function = replace(function, shared_bytes=1 << 18)
    assert not launchable(function, read_kernel_object(path), torch.device("cuda"))


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1}, {"knobs": ...}, {"schema": 99}, {"target": "tpu"}, {"archs": []}, {"archs": ["sm89"]},
        {"archs": ["x86-64-v9"]}, {"archs": "x86-64-v3"}, {"kernel_version": "1"}, {"functions": [{"symbol": "f"}]},
        {"functions": {}}, {"path": "../else.so"}, {"sha256": "0" * 64}, {"toolchain": None}, {"ptx": 5},
    ],
)  # fmt: skip
def test_bad_descriptors_are_refused(native: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="kernels: "):
        load_kernels(edited(native, tmp_path, **changes), CPU)


def test_damaged_files_are_refused(native: Path, tmp_path: Path) -> None:
    path = edited(native, tmp_path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ArtifactError, match="not a kernel descriptor"):
        load_kernels(path, CPU)
    path.with_suffix(".json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="not a kernel descriptor"):
        load_kernels(path, CPU)
    path.with_suffix(".json").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        load_kernels(path, CPU)
    path = edited(native, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="sha256 differs"):
        load_kernels(path, CPU)
    functions = json.loads(native.with_suffix(".json").read_text())["functions"]
    for wrong in ({"block_columns": -1}, {"block_columns": "28"}, {"cluster_blocks": 0}, {"plane_bytes": 32}):
        with pytest.raises(ArtifactError, match="not a kernel descriptor"):
            load_kernels(edited(native, tmp_path, functions=[functions[0] | wrong]), CPU)
    functions[0]["symbol"] = "absent"
    with pytest.raises(ArtifactError, match="lacks absent"):
        load_kernels(edited(native, tmp_path, functions=functions), CPU)
