"""Every environment variable liftc reads; `os.environ` is read nowhere else."""

from __future__ import annotations

import os
from pathlib import Path


def debug_level() -> int:
    """`LIFTC_DEBUG`: 0 silent, 1 timings, 2 pass names, 3 IR after each phase, 4 generated code, 5 tracebacks."""
    value = os.environ.get("LIFTC_DEBUG", "0")
    return int(value) if value.isdigit() else 0


def dump_dir() -> Path | None:
    """`LIFTC_DUMP`: folder that receives the program text after each phase, or None."""
    value = os.environ.get("LIFTC_DUMP")
    return Path(value) if value else None


def verify_enabled() -> bool:
    """`LIFTC_VERIFY=0` turns off the verifier between passes."""
    return os.environ.get("LIFTC_VERIFY", "1") != "0"


def cache_dir() -> Path:
    """`LIFTC_CACHE_DIR`: compiled encoder kernels and converted GGUF files; default `~/.cache/liftc`."""
    value = os.environ.get("LIFTC_CACHE_DIR")
    return Path(value) if value else Path.home() / ".cache" / "liftc"


def records_dir() -> Path:
    """`LIFTC_RECORDS`: the user's kernel measurements; default `liftc/records` in `XDG_DATA_HOME` or
    `~/.local/share`."""
    if value := os.environ.get("LIFTC_RECORDS"):
        return Path(value)
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "liftc" / "records"


def num_threads() -> int:
    """`LIFTC_NUM_THREADS`: threads of the CPU kernels; default: the cores this process may use."""
    value = os.environ.get("LIFTC_NUM_THREADS", "")
    if value.isdigit() and int(value) > 0:
        return int(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def fused() -> bool:
    """`LIFTC_FUSED=0`: norms, gates, GELUs, biases and residuals of loaded graphs stay operations of their own (GPU;
    docs/kernels.md)."""
    return os.environ.get("LIFTC_FUSED") != "0"


def cuda_graph() -> bool:
    """`LIFTC_CUDA_GRAPH=0`: a loaded model decodes by separate launches, not by a CUDA graph."""
    return os.environ.get("LIFTC_CUDA_GRAPH") != "0"


def processes() -> tuple[int, int]:
    """`WORLD_SIZE` and `LOCAL_RANK` as torchrun sets them: (number of processes, this one's GPU)."""
    return int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))


def first_process() -> bool:
    """Whether this process speaks for all that torchrun started (`RANK`)."""
    return os.environ.get("RANK", "0") == "0"


def cuda_home() -> Path | None:
    """`CUDA_HOME` or `CUDA_PATH`: root of a CUDA toolkit, or None."""
    value = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return Path(value) if value else None
