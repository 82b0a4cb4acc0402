"""Do on purpose what compute-sanitizer must report, so that a clean log means something; needs torch and tvm_ffi.

    compute-sanitizer --tool memcheck python scripts/sanitizer_control.py memcheck OUT/kernels/cuda-sm_90a.so
    compute-sanitizer --tool racecheck python scripts/sanitizer_control.py racecheck OUT/kernels/cuda-sm_90a.so

memcheck: the reading kernel of the object is given a tensor whose memory was made smaller. racecheck: a small kernel
of torch's run-time compiler, named so that the filter of scripts/gpu_check.py lets it through, reads what another warp
writes without a barrier in between.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from liftc.runtime.kernels import Kernels, load_kernels

RACE = r"""
extern "C" __global__ void lift_planes_race(int* out) {
  __shared__ int words[64];
  words[threadIdx.x] = out[threadIdx.x];
  out[threadIdx.x] = words[63 - threadIdx.x];
}
"""


def read_past_the_end(kernels: Kernels) -> None:
    """Read 64 KiB of a tensor that has only 4 KiB left; needs PYTORCH_NO_CUDA_MEMORY_CACHING=1 to be an error."""
    pool = torch.ones(1 << 14, dtype=torch.int32, device="cuda")
    seen = torch.zeros(1, dtype=torch.int32, device="cuda")
    pool.untyped_storage().resize_(1 << 12)
    kernels.functions[kernels.of("read_ceiling")[0].symbol](pool, seen, 8)


def race() -> None:
    """Two warps exchange words without waiting for each other."""
    out = torch.arange(64, dtype=torch.int32, device="cuda")
    torch.cuda._compile_kernel(RACE, "lift_planes_race")((1, 1, 1), (64, 1, 1), [out])


def main() -> None:
    kernels = load_kernels(Path(sys.argv[2]), torch.device("cuda", 0))
    if sys.argv[1] == "memcheck":
        read_past_the_end(kernels)
    else:
        race()
    torch.cuda.synchronize()
    print("done, and nothing stopped it")


if __name__ == "__main__":
    main()
