"""The generated CUDA kernels, run on the CPU by an emulator of blocks, against liftc/reference.py.

What a GPU adds (float16 conversions, launches, streams) is in test_kernels_gpu.py.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from liftc import reference
from liftc.format import LiftFormat
from liftc.packing import pack_signs, unpack_signs
from liftc.spec import Z_MAX, transform_shape

pytest.importorskip("tvm", reason="kernels are built with TVM")
from liftc.codegen import library, toolchain
from liftc.codegen.build_cuda import cuda_source
from liftc.codegen.knobs import CudaKnobs

KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) \{')
KNOBS = CudaKnobs(column_slices=4, threads=64, lift_threads=32)
C_TYPES = {"float*": ctypes.c_void_p, "int*": ctypes.c_void_p, "short*": ctypes.c_void_p, "int": ctypes.c_int}


class Emulated:
    """f32 kernels by name, called with a grid, a block and their arguments by name."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "TIR_DTYPES", {"f32": "float32"})
        source = cuda_source(list(library.cuda_templates(KNOBS)))
        kernels = list(KERNEL.finditer(source))
        text = source[kernels[0].start() : source.index("#include <tvm/ffi/c_api.h>")]
        text = text.replace("__shared__ alignas(64)", "static").replace("alignas(64) ", "")
        self.parameters: dict[str, list[tuple[str, str]]] = {}
        launchers = ""
        for kernel in kernels:
            name, declared = kernel[1], kernel[2].replace("__restrict__ ", "")
            pairs = [p.strip().rsplit(" ", 1) for p in declared.split(",")]
            self.parameters[name] = [(kind, argument) for kind, argument in pairs]
            names = ", ".join(argument for _, argument in self.parameters[name])
            launchers += (
                f'extern "C" void run_{name}(int gx, int gy, int gz, int bx, int by, {declared}) {{\n'
                f"  block::run({{gx, gy, gz}}, {{bx, by, 1}}, [=] {{ {name}({names}); }});\n}}\n"
            )
        (folder / "kernels.cpp").write_text('#include "cuda_block_emulator.h"\n' + text + launchers)
        compiler = toolchain.find_c_compiler(cplusplus=True)
        flags = [
            "-O1",
            "-std=c++17",
            "-fPIC",
            "-shared",
            "-w",
            "-fno-strict-aliasing",
            f"-I{Path(__file__).parent}",
        ]
        subprocess.run(
            [str(compiler.path), *flags, "kernels.cpp", "-o", "kernels.so"],
            cwd=folder,
            check=True,
            timeout=120,
        )
        self.library = ctypes.CDLL(str(folder / "kernels.so"))

    def __call__(
        self, name: str, grid: tuple[int, ...], block: tuple[int, int], **arguments: torch.Tensor | int
    ) -> None:
        values = []
        for kind, argument in self.parameters[name]:
            value = arguments[argument.removesuffix("_ptr")]
            values.append(C_TYPES[kind](value.data_ptr() if isinstance(value, torch.Tensor) else value))
        getattr(self.library, f"run_{name}")(*map(ctypes.c_int, (*grid, *block)), *values)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    with pytest.MonkeyPatch.context() as patch:
        return Emulated(tmp_path_factory.mktemp("emulated"), patch)


@pytest.mark.parametrize(
    "tokens, rows, columns", [(1, 33, 7), (3, 64, 129), (2, 1, 1), (1, 100, 50), (2, 31, 3)]
)
def test_sign_matmul_kernel(emulated: Emulated, tokens: int, rows: int, columns: int) -> None:
    g = torch.Generator().manual_seed(rows)
    z = torch.randint(-Z_MAX, Z_MAX + 1, (tokens, columns), generator=g).to(torch.int16)
    packed = pack_signs(torch.randn(rows, columns, generator=g))
    z_scale, scale = torch.rand(tokens, 1, generator=g), torch.rand(rows, generator=g)
    y = torch.full((tokens + 1, rows), 7.0)  # one row more, which must stay as it is
    groups = packed.shape[0]
    emulated(
        "sign_matmul_f32_kernel", (groups, tokens, 1), (32, KNOBS.column_slices), packed=packed, scale=scale, y=y,
        z=z, z_scale=z_scale, G=groups, K=columns, OC=rows, m=tokens,
    )  # fmt: skip
    assert torch.equal(y[:-1], reference.sign_matmul(z, z_scale, packed, scale, torch.float32))
    assert (y[-1] == 7.0).all()


@pytest.mark.parametrize("rows, columns", [(33, 7), (64, 65), (1, 1), (40, 130)])
def test_unpack_signs_kernel(emulated: Emulated, rows: int, columns: int) -> None:
    packed = pack_signs(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)))
    out = torch.full((rows + 1, columns), 7.0)
    blocks = -(-columns // KNOBS.threads)
    emulated(
        "unpack_signs_f32_kernel",
        (blocks, rows, 1),
        (KNOBS.threads, 1),
        out=out,
        packed=packed,
        K=columns,
        OC=rows,
    )
    assert torch.equal(out[:-1], unpack_signs(packed, rows)) and (out[-1] == 7.0).all()


@pytest.mark.parametrize(
    "in_features, fmt", [(70, LiftFormat(19, 8)), (33, LiftFormat(24, 10)), (5, LiftFormat(1, 1))]
)
def test_lift_kernels(emulated: Emulated, in_features: int, fmt: LiftFormat) -> None:
    g = torch.Generator().manual_seed(in_features)
    t1, t2 = transform_shape(in_features, fmt)
    lifted = t2 // fmt.subspace_dim * fmt.lifted_dim
    n, width = 5, t1 * lifted
    x = torch.randn(n, in_features, generator=g)
    x[1] = 0.0
    x[2, -1] = torch.nan
    x[3, 0] = torch.inf
    left, right = torch.randn(t1, t1, generator=g), torch.randn(t2, lifted, generator=g)
    scale = torch.rand(in_features, generator=g) + 0.5
    mixed, real = torch.full((n, t1, t2), 9.0), torch.full((n, width), 9.0)
    z, z_scale = torch.full((n, width), 9, dtype=torch.int16), torch.full((n, 1), 9.0)
    sizes = {"n": n, "t1": t1, "t2": t2, "C": lifted, "K": width, "IC": in_features}
    tensors = {"x": x, "in_scale": scale, "left": left, "right": right, "mixed": mixed, "real": real}
    tensors["bound"] = reference.lift_bound(left, right).reshape(1)
    threads = KNOBS.lift_threads
    emulated("lift_f32_kernel", (-(-t2 // threads), t1, n), (threads, 1), **tensors, **sizes)
    emulated("lift_f32_kernel_1", (-(-lifted // threads), t1, n), (threads, 1), **tensors, **sizes)
    emulated("lift_f32_kernel_2", (n, 1, 1), (KNOBS.threads, 1), **tensors, z=z, z_scale=z_scale, **sizes)
    want, want_scale = reference.lift(x, scale, left, right)
    assert int((z.int() - want.int()).abs().max()) <= 1 and not z[1:4].any()
    assert z[0].any() and z[4].any()
    torch.testing.assert_close(z_scale, want_scale, rtol=1e-5, atol=0, equal_nan=True)
