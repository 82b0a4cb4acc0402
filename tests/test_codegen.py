"""Building kernels: toolchain lookup, architectures, contents of the object, refusals."""

from __future__ import annotations

import itertools
import os
import struct
from pathlib import Path

import pytest
import torch

from liftc.errors import BuildError
from liftc.kernel_object import CPU_FEATURES, TARGETS, cpu_features, machine_flags, read_kernel_object
from liftc.packing import pack_signs
from liftc.reference import sign_matmul
from liftc.runtime.kernels import load_kernels

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import build as build_module
from liftc.codegen import fatbin, library, toolchain
from liftc.codegen.build import build, check_toolchain, native_cpu_level
from liftc.codegen.default_knobs import CPU_KNOBS
from liftc.codegen.knobs import CpuKnobs, CudaKnobs

try:
    NVCC: toolchain.Tool | None = toolchain.find_nvcc()
except BuildError:
    NVCC = None
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")


def fake_tool(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


FAKE_NVCC = """case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.77";;
--list-gpu-code) printf 'sm_75\\nsm_80\\nsm_89\\nsm_90\\nsm_120\\n';;
*) echo "nvcc fatal   : pretend failure" >&2; exit 1;;
esac"""


@pytest.fixture
def fake_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake_tool(tmp_path / "cuda" / "bin", "nvcc", FAKE_NVCC)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return tmp_path / "cuda"


def only(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Build kernels of one dtype and one batch size, to save time."""
    monkeypatch.setattr(library, "TIR_DTYPES", {dtype: library.TIR_DTYPES[dtype]})
    for table in ("TENSOR_CORE_KNOBS", "LIFT_KNOBS"):
        few = {family: knobs[:1] for family, knobs in getattr(library, table).items()}
        monkeypatch.setattr(library, table, few)
    monkeypatch.setattr(library, "GROUP_LIFT_KNOBS", {})  # tests/test_warpgroup.py compiles these


def test_cpu_build_is_reproducible_and_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "f16")
    level = "x86-64-v2"
    knobs = CpuKnobs(token_tiles=(1,), pair_lanes=4, lift_rows=2, lift_lanes=8)
    first = build("llvm", (level,), tmp_path / "a", knobs=knobs)
    second = build("llvm", (), tmp_path / "b", cpu=level, knobs=knobs)
    assert first.path == tmp_path / "a" / "kernels" / f"llvm-{level}.so"
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.descriptor.read_bytes() == second.descriptor.read_bytes()
    assert read_kernel_object(first.path) == first
    assert (
        first.features == cpu_features(level) and "sse4_2" in first.features and "avx" not in first.features
    )
    assert (
        "pair_lanes=4" in first.knobs and "LLVM" in first.toolchain and str(tmp_path) not in first.to_json()
    )
    kernels = load_kernels(first.path, torch.device("cpu"))
    z = torch.randint(-9, 10, (3, 1, 13), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    packed = pack_signs(torch.randn(70, 13, generator=torch.Generator().manual_seed(0)))
    y, ones = torch.zeros(3, 1, 70, dtype=torch.float16), torch.ones(3, 1, 1)
    kernels.functions["sign_matmul_f16_tile1"](z, ones, packed, torch.ones(70), y)
    assert torch.equal(y, sign_matmul(z, ones, packed, torch.ones(70), torch.float16))
    assert sorted(p.name for p in first.path.parent.iterdir()) == [f"llvm-{level}.json", f"llvm-{level}.so"]


def test_every_op_and_dtype_has_a_kernel_without_limits() -> None:
    for templates in (library.cpu_templates(CPU_KNOBS["x86-64-v4"]), library.cuda_templates(CudaKnobs())):
        functions = [t.function for t in templates]
        assert len({f.symbol for f in functions}) == len(functions)
        for op in ("lift", "sign_matmul", "unpack_signs"):
            for dtype in library.TIR_DTYPES:
                mine = [f for f in functions if f.op == op and f.dtype == dtype]
                assert any(f.accepts(12345679, 7, 11) for f in mine), (op, dtype)


def test_cpu_levels_nest_and_native_is_one_of_them() -> None:
    sets = [set(cpu_features(level)) for level in CPU_FEATURES]
    assert all(a < b for a, b in itertools.pairwise(sets))
    assert set(cpu_features(native_cpu_level())) <= machine_flags()


def test_native_level_follows_the_cpu_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "machine_flags", lambda: frozenset(cpu_features("x86-64-v3")))
    assert native_cpu_level() == "x86-64-v3"
    monkeypatch.setattr(build_module, "machine_flags", frozenset)
    with pytest.raises(BuildError, match=r"SSE4\.2"):
        native_cpu_level()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(BuildError, match="this machine is aarch64"):
        native_cpu_level()


@pytest.mark.parametrize(
    "target, archs, message",
    [
        ("tpu", (), "there is no target 'tpu': choose from llvm, cuda"),
        ("llvm", ("x86-64-v9",), "CPU level 'x86-64-v9' is unknown: choose native or one of x86-64-v2"),
        ("llvm", ("x86-64-v2", "x86-64-v3"), "one CPU level per object"),
    ],
)
def test_bad_targets(tmp_path: Path, target: str, archs: tuple[str, ...], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        build(target, archs, tmp_path)


def test_knobs_of_another_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="target llvm does not take CudaKnobs"):
        build("llvm", (), tmp_path, knobs=CudaKnobs())


@pytest.mark.parametrize(
    "arch", ["sm_12", "sm_999", "sm89", "sm_75", "sm_89a", "compute_89", "", "sm_90 ", "sm_90f"]
)
def test_unknown_architectures_list_the_known_ones(fake_cuda: Path, arch: str) -> None:
    with pytest.raises(
        BuildError, match=r"not one that nvcc 13\.0\.77 .* sm_80, sm_89, sm_90, sm_90a, sm_120, sm_120a"
    ):
        check_toolchain(("cuda",), ("sm_89", arch))


def test_cuda_needs_an_architecture(fake_cuda: Path) -> None:
    with pytest.raises(BuildError, match="needs an architecture, for example -arch=sm_89"):
        check_toolchain(("llvm", "cuda"))


def test_architectures_are_sorted_and_unique(fake_cuda: Path) -> None:
    nvcc = toolchain.find_nvcc()
    assert nvcc.source == "CUDA_HOME" and nvcc.version == "13.0.77"
    wanted = ("sm_120", "sm_90a", "sm_80", "sm_90", "sm_80")
    assert toolchain.check_archs(wanted, nvcc) == ("sm_80", "sm_90", "sm_90a", "sm_120")


def test_nvcc_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    fake_tool(tmp_path / "bin", "nvcc", FAKE_NVCC)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    assert toolchain.find_nvcc().source == "PATH"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(toolchain, "USUAL_CUDA", tmp_path / "usual")
    fake_tool(tmp_path / "site" / "cu13" / "bin", "nvcc", FAKE_NVCC)
    monkeypatch.setattr(toolchain, "_pip_folders", lambda: [tmp_path / "site" / "cu13"])
    monkeypatch.setenv("PATH", "/bin:/usr/bin" if not (Path("/usr/bin/nvcc").exists()) else "/nowhere")
    assert toolchain.find_nvcc().source == "pip packages"
    fake_tool(tmp_path / "usual" / "bin", "nvcc", FAKE_NVCC)
    assert toolchain.find_nvcc().source == str(tmp_path / "usual")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
    with pytest.raises(BuildError, match="nvcc does not exist; correct or unset it"):
        toolchain.find_nvcc()


def test_missing_nvcc_names_the_pip_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "USUAL_CUDA", tmp_path / "usual")
    monkeypatch.setattr(toolchain, "_pip_folders", list)
    with pytest.raises(BuildError) as caught:
        build("cuda", ("sm_89",), tmp_path)
    message = str(caught.value)
    assert "pip install 'liftc[cuda]'" in message and all(name in message for name in toolchain.PIP_PACKAGES)
    assert list((tmp_path / "kernels").iterdir()) == []


def test_missing_host_compilers_are_named(monkeypatch: pytest.MonkeyPatch, fake_cuda: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BuildError, match="needs a C compiler, PATH has none of gcc"):
        check_toolchain(("llvm",))
    with pytest.raises(BuildError, match=r"cannot run .*nvcc|needs a C\+\+ compiler"):
        check_toolchain(("cuda",), ("sm_89",))


def test_compiler_failure_is_one_sentence_and_leaves_nothing(
    fake_cuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "f32")
    with pytest.raises(BuildError, match="CUDA kernels: nvcc failed: nvcc fatal   : pretend failure"):
        build("cuda", ("sm_89",), tmp_path / "out")
    assert os.listdir(tmp_path / "out" / "kernels") == []


def test_object_without_machine_code_is_refused(
    fake_cuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "f32")
    script = FAKE_NVCC.replace(
        'echo "nvcc fatal   : pretend failure" >&2; exit 1',
        "while [ $1 != -o ]; do shift; done; cp /dev/null $2",
    )
    fake_tool(fake_cuda / "bin", "nvcc", script)
    with pytest.raises(BuildError, match="no machine code of sign_matmul_f32 for sm_89"):
        build("cuda", ("sm_89",), tmp_path / "out")
    assert os.listdir(tmp_path / "out" / "kernels") == []


def entry(kind: int, sm: int, flags: int, payload: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(payload)).ljust(64, b"\0")
    header = header[:28] + struct.pack("<I", sm) + header[32:40] + struct.pack("<I", flags) + header[44:]
    return header + payload


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_fatbin_entries_are_read() -> None:
    data = b"head" + container(entry(2, 90, 0x100011, b"code"), entry(1, 90, 0x11, b"text")) + b"between"
    data += container(entry(2, 80, 0x11, b"more"))
    assert list(fatbin.device_code(data)) == [
        fatbin.DeviceCode("machine code", "sm_90a", b"code"),
        fatbin.DeviceCode("ptx", "sm_90", b"text"),
        fatbin.DeviceCode("machine code", "sm_80", b"more"),
    ]


def test_malformed_fatbins_end_quietly() -> None:
    good = container(entry(2, 80, 0, b"code"))
    for data in (
        b"",
        good[:8],
        good[:-1],
        good[:40],
        container(b"\xff" * 80),
        container(entry(7, 80, 0, b"x")),
    ):
        assert list(fatbin.device_code(data)) == []


@needs_nvcc
def test_cuda_object_holds_machine_code_and_ptx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "bf16")
    made = build("cuda", ("sm_90a", "sm_89"), tmp_path)
    assert made.archs == ("sm_89", "sm_90a") and made.ptx == "compute_90" and "nvcc" in made.toolchain
    assert read_kernel_object(made.path) == made and TARGETS[made.target] == "cuda"
    codes = list(fatbin.device_code(made.path.read_bytes()))
    for arch in made.archs:
        machine = b"".join(c.payload for c in codes if c.kind == "machine code" and c.arch == arch)
        assert machine.count(b"\x7fELF") >= 1
        for function in made.functions:
            here = not function.archs or arch in function.archs.split(",")
            assert (f".text.{function.symbol}_kernel".encode() in machine) == here
    import tvm_ffi

    module = tvm_ffi.load_module(str(made.path))
    assert all(module.implements_function(f.symbol) for f in made.functions)
