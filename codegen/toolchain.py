"""Compilers on this machine: where nvcc and the C compiler are, what they can build."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from liftc import env
from liftc.errors import BuildError

PIP_PACKAGES = (
    "nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl",
)  # fmt: skip
USUAL_CUDA = Path("/usr/local/cuda")
OLDEST_SM = 80
"""Oldest architecture the CUDA kernels are generated for (bfloat16 conversions)."""

_SM = re.compile(r"sm_(\d{2,3})(a?)")


@dataclass(frozen=True)
class Tool:
    """A compiler: its path, version and where it was found."""

    path: Path
    version: str
    source: str

    def describe(self) -> str:
        """ "nvcc 13.0.88 (PATH)": no path of the building machine, so that equal builds give equal bytes."""
        return f"{self.path.name} {self.version} ({self.source})"


def find_nvcc() -> Tool:
    """nvcc of CUDA_HOME or CUDA_PATH, else PATH, /usr/local/cuda, the pip packages; BuildError if none.

    A CUDA_HOME that is set but has no nvcc is an error, not skipped.
    """
    home = env.cuda_home()
    if home is not None:
        if not (home / "bin" / "nvcc").is_file():
            raise BuildError(
                f"CUDA_HOME is {home}, but {home / 'bin' / 'nvcc'} does not exist; correct or unset it"
            )
        return _nvcc(home / "bin" / "nvcc", "CUDA_HOME")
    if found := shutil.which("nvcc"):
        return _nvcc(Path(found), "PATH")
    if (USUAL_CUDA / "bin" / "nvcc").is_file():
        return _nvcc(USUAL_CUDA / "bin" / "nvcc", str(USUAL_CUDA))
    for folder in _pip_folders():
        if (folder / "bin" / "nvcc").is_file():
            return _nvcc(folder / "bin" / "nvcc", "pip packages")
    raise BuildError(
        "CUDA kernels need nvcc, and none was found in CUDA_HOME, PATH, /usr/local/cuda or the pip packages: "
        f"run pip install 'liftc[cuda]' (it brings {', '.join(PIP_PACKAGES)})"
    )


def _pip_folders() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else None
    return sorted((f for root in roots or [] for f in Path(root).glob("cu[0-9]*")), reverse=True)


def _nvcc(path: Path, source: str) -> Tool:
    text = _output([str(path), "--version"])
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    if not match:
        raise BuildError(
            f"{path} does not answer --version as nvcc does; put a working CUDA toolkit in its place"
        )
    return Tool(path, match[1], source)


def find_c_compiler(cplusplus: bool = False) -> Tool:
    """gcc (or g++, which nvcc needs) of PATH, else clang; BuildError if there is none."""
    names = ("g++", "clang++") if cplusplus else ("gcc", "clang", "cc")
    for name in names:
        if found := shutil.which(name):
            version = _output([found, "-dumpfullversion", "-dumpversion"]).strip().splitlines()
            return Tool(Path(found), version[0] if version else "unknown", "PATH")
    raise BuildError(
        f"building kernels needs a {'C++' if cplusplus else 'C'} compiler, PATH has none of {', '.join(names)}"
        f": install one, for example apt-get install {names[0]}"
    )


def supported_archs(nvcc: Tool) -> tuple[str, ...]:
    """Architectures this nvcc builds and the kernels support, plain and, from sm_90 on, with the letter a."""
    numbers = sorted({int(n) for n in re.findall(r"sm_(\d+)", _output([str(nvcc.path), "--list-gpu-code"]))})
    return tuple(
        f"sm_{n}{letter}" for n in numbers if n >= OLDEST_SM for letter in ("", "a") if not letter or n >= 90
    )


def check_archs(archs: Sequence[str], nvcc: Tool) -> tuple[str, ...]:
    """The requested architectures, each once, in rising order; BuildError for one nvcc cannot build."""
    known = supported_archs(nvcc)
    if not archs:
        raise BuildError(
            f"target cuda needs an architecture, for example -arch=sm_89; known: {', '.join(known)}"
        )
    for arch in archs:
        if arch not in known:
            raise BuildError(
                f"architecture {arch!r} is not one that {nvcc.describe()} builds liftc kernels for; choose "
                f"from {', '.join(known)}"
            )
    return tuple(sorted(set(archs), key=lambda a: (arch_number(a), a)))


def arch_number(arch: str) -> int:
    """90 of "sm_90a"."""
    match = _SM.fullmatch(arch)
    if not match:
        raise BuildError(f"{arch!r} is not an architecture: write it as sm_89 or sm_90a")
    return int(match[1])


def run_compiler(command: Sequence[str], folder: Path, what: str) -> str:
    """Run a compiler in `folder`; returns its output, raises BuildError with the first error line of it."""
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{what}: cannot run {command[0]} ({error.strerror})") from None
    output = result.stdout + result.stderr
    if result.returncode:
        lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no message"]
        first = next((line for line in lines if "error" in line or "fatal" in line), lines[-1])
        raise BuildError(f"{what}: {Path(command[0]).name} failed: {first}")
    return output


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"cannot run {command[0]} ({error})") from None
