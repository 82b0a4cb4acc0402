"""Descriptor of one file of compiled kernels: what it holds and what it needs to run.

codegen writes `<name>.so` and `<name>.json`, the runtime reads both; neither imports the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from liftc.errors import ArtifactError

SCHEMA_VERSION = 1
TARGETS = {"llvm": "cpu", "cuda": "cuda"}
"""Compile target -> torch device type of the machines that run it."""

CPU_FEATURES: dict[str, tuple[str, ...]] = {
    "x86-64-v2": ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"),
    "x86-64-v3": ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"),
    "x86-64-v4": ("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"),
}
"""CPU flags (names of /proc/cpuinfo) that each psABI level adds to the one before it."""

_LATER_FIELDS = (
    "shared_bytes", "archs", "block_rows", "block_results", "most_left", "most_right", "knobs", "plane_bytes",
    "cluster_blocks", "block_columns",
)  # fmt: skip
"""Fields of functions that descriptors of older builds lack."""

_ARCH = re.compile(r"sm_\d{2,3}a?")


@dataclass(frozen=True)
class KernelFunction:
    """One exported function. `symbol` is its name in the object, `op` the work it does, `dtype` the floating
    type it is made for (a key of liftc.spec.DTYPES; "" where the type is chosen at run time).

    `version` is raised when results or arguments change. Several functions may serve one op and dtype; the
    runtime takes the first whose limits hold: tokens at most `max_tokens` (0: no limit), and tokens,
    out_features and lifted_features multiples of `token_multiple`, `row_multiple` and `column_multiple`.
    CUDA: `shared_bytes` is the shared memory its launch asks for, `archs` the architectures it is compiled for,
    separated by commas ("": all of the object). `block_rows` and `block_results` are what one thread block takes at
    most, row blocks of a product, or of a lift 16-column tiles and tokens; a lift takes factors of at most
    `most_left` and `most_right`.
    `knobs` are the choices it was made with, "name=value" separated by blanks ("": it has none). A product reads
    planes in which `plane_bytes` bytes of a column lie together; `cluster_blocks` blocks share the rows of one. A lift
    with `block_columns` computes so many columns of all rows in a block instead of tiles of a share of them.
    """

    symbol: str
    op: str
    dtype: str
    version: int = 1
    max_tokens: int = 0
    token_multiple: int = 1
    row_multiple: int = 1
    column_multiple: int = 1
    shared_bytes: int = 0
    archs: str = ""
    block_rows: int = 0
    block_results: int = 0
    most_left: int = 0
    most_right: int = 0
    knobs: str = ""
    plane_bytes: int = 64
    cluster_blocks: int = 1
    block_columns: int = 0

    def accepts(self, tokens: int, out_features: int, lifted_features: int) -> bool:
        """Whether this function computes a call of these sizes."""
        return (
            (not self.max_tokens or tokens <= self.max_tokens)
            and tokens % self.token_multiple == 0
            and out_features % self.row_multiple == 0
            and lifted_features % self.column_multiple == 0
        )


@dataclass(frozen=True)
class KernelResources:
    """What the assembler gave a kernel on one architecture: registers per thread, bytes spilled to memory per
    thread (stores and loads), bytes of shared memory beside those of its launch (KernelFunction.shared_bytes).
    """

    symbol: str
    arch: str
    registers: int
    spill_bytes: int
    static_shared: int


@dataclass(frozen=True)
class KernelObject:
    """A shared object of kernels. target "llvm": `archs` is one CPU level and `features` the CPU flags it
    needs; target "cuda": `archs` are the sm_XX with machine code and `ptx` the compute_XX kept for newer
    chips ("" for none). `sha256` is of the file; `knobs` are the schedule choices it was built with; `resources`
    has one entry per kernel and architecture (CUDA only).
    """

    path: Path
    target: str
    archs: tuple[str, ...]
    ptx: str
    features: tuple[str, ...]
    toolchain: str
    kernel_version: int
    knobs: tuple[str, ...]
    functions: tuple[KernelFunction, ...]
    sha256: str
    resources: tuple[KernelResources, ...] = ()

    @property
    def descriptor(self) -> Path:
        """Path of the descriptor that goes with the file."""
        return self.path.with_suffix(".json")

    def to_json(self) -> str:
        """Text of the descriptor; the file is named without its folder."""
        record = {"schema": SCHEMA_VERSION} | asdict(self) | {"path": self.path.name}
        return json.dumps(record, indent=1, sort_keys=True) + "\n"


def cpu_features(level: str) -> tuple[str, ...]:
    """All CPU flags that code of this psABI level may use, sorted."""
    names = list(CPU_FEATURES)
    return tuple(sorted(f for name in names[: names.index(level) + 1] for f in CPU_FEATURES[name]))


def machine_flags() -> frozenset[str]:
    """CPU flags of this machine as /proc/cpuinfo names them; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_kernel_object(path: Path, verify_hash: bool = True) -> KernelObject:
    """Read and check the descriptor of the kernels at `path`; raises ArtifactError.

    Refused: a missing file, JSON that is not exactly the fields of KernelObject, values of another type, an
    unknown target or schema, and (verify_hash) a file whose sha256 differs.
    """
    descriptor = path.with_suffix(".json")
    for needed in (path, descriptor):
        if not needed.is_file():
            raise ArtifactError(f"kernels: {needed} is missing; run liftc compile again")
    try:
        record = json.loads(descriptor.read_text())
        result = _from_record(record, path)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(f"kernels: {descriptor} is not a kernel descriptor ({error})") from None
    if verify_hash and file_sha256(path) != result.sha256:
        raise ArtifactError(
            f"kernels: {path} is not the file its descriptor names (sha256 differs); compile again"
        )
    return result


def _from_record(record: Any, path: Path) -> KernelObject:
    if not isinstance(record, dict):
        raise ValueError("not an object")
    if record.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"schema {record.get('schema')!r}, this liftc reads {SCHEMA_VERSION}")
    record = {"resources": []} | record
    values = _exactly(record, {f.name for f in fields(KernelObject)} | {"schema"})
    del values["schema"]
    for name in ("path", "target", "ptx", "toolchain", "sha256"):
        if not isinstance(values[name], str):
            raise ValueError(f"{name} is not text")
    for name in ("archs", "features", "knobs"):
        if not isinstance(values[name], list) or not all(isinstance(v, str) for v in values[name]):
            raise ValueError(f"{name} is not a list of texts")
        values[name] = tuple(values[name])
    if type(values["kernel_version"]) is not int:
        raise ValueError("kernel_version is not a number")
    if values["path"] != path.name:
        raise ValueError(f"it describes {values['path']!r}")
    if not isinstance(values["functions"], list):
        raise ValueError("functions is not a list")
    values["functions"] = tuple(_function(f) for f in values["functions"])
    if not isinstance(values["resources"], list):
        raise ValueError("resources is not a list")
    values["resources"] = tuple(_resources(r) for r in values["resources"])
    result = replace(KernelObject(**values), path=path)
    if result.target not in TARGETS or not result.archs:
        raise ValueError(f"target {result.target!r} with architectures {list(result.archs)}")
    known = _ARCH.fullmatch if result.target == "cuda" else CPU_FEATURES.get
    if unknown := [arch for arch in result.archs if not known(arch)]:
        raise ValueError(f"unknown architecture {unknown[0]!r}")
    return result


def _function(record: Any) -> KernelFunction:
    if isinstance(record, dict):
        record = {f.name: f.default for f in fields(KernelFunction) if f.name in _LATER_FIELDS} | record
    values = _exactly(record, {f.name for f in fields(KernelFunction)})
    for name, value in values.items():
        if type(value) is not (str if name in ("symbol", "op", "dtype", "archs", "knobs") else int):
            raise ValueError(f"{name} of a function is {value!r}")
    if values["plane_bytes"] not in (16, 64) or values["cluster_blocks"] < 1 or values["block_columns"] < 0:
        raise ValueError(
            f"planes of {values['plane_bytes']} bytes, clusters of {values['cluster_blocks']} blocks, "
            f"blocks of {values['block_columns']} columns"
        )
    return KernelFunction(**values)


def _resources(record: Any) -> KernelResources:
    values = _exactly(record, {f.name for f in fields(KernelResources)})
    for name, value in values.items():
        if type(value) is not (str if name in ("symbol", "arch") else int):
            raise ValueError(f"{name} of a kernel's resources is {value!r}")
    return KernelResources(**values)


def _exactly(record: Any, names: set[str]) -> dict[str, Any]:
    if not isinstance(record, dict) or set(record) != names:
        odd = set(record) ^ names if isinstance(record, dict) else set()
        raise ValueError(f"unknown or missing keys {sorted(odd)}")
    return dict(record)
