"""The list of kernels: what each target's object contains, in the order the runtime prefers them.

To add an implementation of an op beside the present one, put an entry before it whose KernelFunction limits
say which calls it takes (tokens, multiples of rows and columns); the runtime gives it those calls and
leaves the rest to the entries after it. One entry of every op and dtype must have no limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from liftc.codegen.default_knobs import (
    BINARY_KNOBS,
    GROUP_LIFT_KNOBS,
    LIFT_KNOBS,
    POPCOUNT_KNOBS,
    TENSOR_CORE_KNOBS,
    chip_family,
)
from liftc.codegen.knobs import (
    BinaryKnobs,
    CpuKnobs,
    CudaKnobs,
    GroupLiftKnobs,
    LiftKnobs,
    PopcountKnobs,
    TensorCoreKnobs,
)
from liftc.kernel_object import KernelFunction

KERNEL_VERSION = 8
"""Raised when any kernel changes its results, arguments or layout, or its time so much that older records mislead."""

TIR_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class KernelTemplate:
    """A function of the object and how to make its scheduled PrimFunc."""

    function: KernelFunction
    make: Callable[[], Any]


@dataclass(frozen=True)
class Unit:
    """One CUDA source: kernels compiled for the same architectures. tirx: hand-written, else scheduled TensorIR."""

    name: str
    archs: tuple[str, ...]
    templates: tuple[KernelTemplate, ...]
    tirx: bool
    knobs: tuple[str, ...] = ()


@dataclass(frozen=True)
class TunedTemplate:
    """A tensor-core template whose knobs are chosen per family of chips, by table or by records.

    knobs: dataclass of the choices, with `tokens`, `shared_bytes()` and `describe()`. choices(): family -> the
    knobs in use, fewest tokens first, none where the family lacks the instructions. make(name, archs, choices):
    its kernels, symbols with `name` in them.
    """

    op: str
    knobs: type[Any]
    choices: Callable[[], Mapping[str, tuple[Any, ...]]]
    make: Callable[[str, tuple[str, ...], tuple[Any, ...]], Iterator[KernelTemplate]]


Chosen = Mapping[tuple[str, str], tuple[Any, ...]]
"""(family, op) -> knobs of a TunedTemplate that take the place of its choices for the family."""


def cpu_templates(knobs: CpuKnobs) -> Iterator[KernelTemplate]:
    """Kernels of the CPU object; imports TVM."""
    from liftc.codegen import schedule_cpu

    for short, dtype in TIR_DTYPES.items():
        for tile in knobs.token_tiles:
            symbol = f"sign_matmul_{short}_tile{tile}"
            yield KernelTemplate(
                KernelFunction(symbol, "sign_matmul", short, token_multiple=tile),
                partial(schedule_cpu.sign_matmul, symbol, dtype, tile, knobs),
            )
        symbol = f"unpack_signs_{short}"
        yield KernelTemplate(
            KernelFunction(symbol, "unpack_signs", short),
            partial(schedule_cpu.unpack_signs, symbol, dtype),
        )
        for suffix, max_tokens in (("_one", 1), ("", 0)):
            symbol = f"lift_{short}{suffix}"
            yield KernelTemplate(
                KernelFunction(symbol, "lift", short, max_tokens=max_tokens),
                partial(schedule_cpu.lift, symbol, dtype, not max_tokens, knobs),
            )


def cuda_templates(knobs: CudaKnobs) -> Iterator[KernelTemplate]:
    """Kernels of the CUDA object; imports TVM."""
    from liftc.codegen import schedule_cuda

    for short, dtype in TIR_DTYPES.items():
        for op, schedule in (
            ("sign_matmul", schedule_cuda.sign_matmul),
            ("unpack_signs", schedule_cuda.unpack_signs),
            ("lift", schedule_cuda.lift),
        ):
            symbol = f"{op}_{short}"
            yield KernelTemplate(KernelFunction(symbol, op, short), partial(schedule, symbol, dtype, knobs))
    yield from tile_templates()


def tile_templates() -> Iterator[KernelTemplate]:
    """Kernels that write and read the tile layout, for every architecture; imports TVM."""
    from liftc.codegen import tir_tiles

    yield KernelTemplate(
        KernelFunction("tile_signs", "tile_signs", "i32"), partial(tir_tiles.tile_signs, "tile_signs")
    )


def decode_templates() -> Iterator[KernelTemplate]:
    """Kernels of the weight-first order, for every architecture, smallest transforms first; imports TVM."""
    from liftc.codegen import tensorcore_decode, tensorcore_whiten, tir_tiles

    for short in sorted(TIR_DTYPES.keys() - {"f32"}):
        for left, right in tensorcore_whiten.SIZES:
            symbol = f"whiten_{short}_{left}_{right}"
            function = KernelFunction(
                symbol, "whiten", short, most_left=left * 16, most_right=right * 16,
                shared_bytes=tensorcore_whiten.shared_bytes(left, right),
            )  # fmt: skip
            make = partial(tensorcore_whiten.whiten, symbol, TIR_DTYPES[short], short, left, right)
            yield KernelTemplate(function, make)

    for short, dtype in TIR_DTYPES.items():
        symbol = f"decode_tiles_{short}"
        function = KernelFunction(
            symbol, "decode_tiles", short, shared_bytes=tensorcore_decode.SHARED_BYTES,
            block_results=tensorcore_decode.MOST_FRAGMENTS,
        )  # fmt: skip
        yield KernelTemplate(function, partial(tensorcore_decode.decode_tiles, symbol, dtype, short))
        symbol = f"unpack_tiles_{short}"
        yield KernelTemplate(
            KernelFunction(symbol, "unpack_tiles", short),
            partial(tir_tiles.unpack_tiles, symbol, dtype, short),
        )


def tensor_core_templates(
    name: str, archs: tuple[str, ...], choices: tuple[TensorCoreKnobs, ...]
) -> Iterator[KernelTemplate]:
    """The tensor-core sign_matmul of one family of chips, fewest tokens first; imports TVM."""
    from liftc.codegen import tensorcore_sign

    for knobs in choices:
        symbol = f"sign_matmul_tiled_{name}_{knobs.tokens}"
        function = KernelFunction(
            symbol, "sign_matmul_tiled", "", max_tokens=knobs.tokens, shared_bytes=knobs.shared_bytes(),
            archs=",".join(archs), block_rows=knobs.block_rows, knobs=" ".join(knobs.describe()),
        )  # fmt: skip
        yield KernelTemplate(function, partial(tensorcore_sign.sign_matmul_tiled, symbol, knobs))


def popcount_templates(
    name: str, archs: tuple[str, ...], choices: tuple[PopcountKnobs, ...]
) -> Iterator[KernelTemplate]:
    """The binary tensor-core sign_matmul of one family of chips, fewest tokens first; imports TVM."""
    from liftc.codegen import tensorcore_popcount

    for knobs in choices:
        symbol = f"sign_matmul_popcount_{name}_{knobs.tokens}"
        function = KernelFunction(
            symbol, "sign_matmul_popcount", "", max_tokens=knobs.tokens, shared_bytes=knobs.shared_bytes(),
            archs=",".join(archs), block_rows=knobs.block_rows, knobs=" ".join(knobs.describe()),
        )  # fmt: skip
        yield KernelTemplate(function, partial(tensorcore_popcount.sign_matmul_popcount, symbol, knobs))


def binary_templates(
    name: str, archs: tuple[str, ...], choices: tuple[BinaryKnobs, ...]
) -> Iterator[KernelTemplate]:
    """The binary warp-group sign_matmul of sm_90a, fewest tokens first; imports TVM."""
    from liftc.codegen import tensorcore_binary

    for knobs in choices:
        symbol = f"sign_matmul_binary_{name}_{knobs.tokens}"
        function = KernelFunction(
            symbol, "sign_matmul_binary", "", max_tokens=knobs.tokens, shared_bytes=knobs.shared_bytes(),
            archs=",".join(archs), block_rows=knobs.block_rows, knobs=" ".join(knobs.describe()), plane_bytes=16,
            cluster_blocks=knobs.split,
        )  # fmt: skip
        yield KernelTemplate(function, partial(tensorcore_binary.sign_matmul_binary, symbol, knobs))


def fixed_templates(name: str, archs: tuple[str, ...]) -> Iterator[KernelTemplate]:
    """Kernels without choices that belong to the tensor-core ones of a family; imports TVM."""
    from liftc.codegen import tensorcore_split, tir_measure

    symbol = f"read_ceiling_{name}"
    yield KernelTemplate(
        KernelFunction(symbol, "read_ceiling", "i32", archs=",".join(archs)),
        partial(tir_measure.read_ceiling, symbol),
    )
    members = ",".join(archs)
    symbol = f"split_z_{name}"
    yield KernelTemplate(
        KernelFunction(symbol, "split_z", "i16", archs=members), partial(tensorcore_split.split_z, symbol)
    )


def usual_form(knobs: LiftKnobs | GroupLiftKnobs) -> str:
    """What a language model has before a lift with factors as small or as large as these: a norm or a gate."""
    return "norm" if knobs.most_left <= 64 else "gate"


def lift_templates(
    name: str, archs: tuple[str, ...], choices: tuple[LiftKnobs, ...]
) -> Iterator[KernelTemplate]:
    """The lift in one launch for one family of chips, fewest tokens first: alone, behind a norm, a gate and so on.

    Imports TVM.
    """
    from liftc.codegen import tensorcore_lift

    members = ",".join(archs)
    for knobs in choices:
        for form in tensorcore_lift.FORMS:
            op = "lift_planes" if form == "plain" else f"lift_planes_{form}"
            for short, dtype in TIR_DTYPES.items():
                if form != "plain" and short == "f32":
                    continue  # language models run in half precision on a GPU
                if not knobs.takes_any() and (form not in ("plain", usual_form(knobs)) or short == "f32"):
                    continue  # knobs for some factors are for what is used most
                # float32 needs more registers than two blocks leave
                used = replace(knobs, blocks_per_processor=1) if short == "f32" else knobs
                symbol = f"{op}_{name}_{short}_{knobs.tokens}_{knobs.most_left}x{knobs.most_right}"
                function = KernelFunction(
                    symbol, op, short, max_tokens=knobs.tokens, shared_bytes=knobs.shared_bytes(), archs=members,
                    block_rows=knobs.tiles, block_results=knobs.group, most_left=knobs.most_left,
                    most_right=knobs.most_right, knobs=" ".join(used.describe()), cluster_blocks=knobs.cluster,
                )  # fmt: skip
                make = partial(tensorcore_lift.lift_planes, symbol, dtype, used, form)
                yield KernelTemplate(function, make)


def group_lift_templates(
    name: str, archs: tuple[str, ...], choices: tuple[GroupLiftKnobs, ...]
) -> Iterator[KernelTemplate]:
    """The warp-group lift of sm_90a, fewest tokens first; imports TVM."""
    from liftc.codegen import warpgroup_lift

    for knobs in choices:
        for form in ("plain", usual_form(knobs)):
            op = "lift_planes_grouped" if form == "plain" else f"lift_planes_{form}"
            for short in sorted(TIR_DTYPES.keys() - {"f32"}):  # as for other knobs for some factors
                symbol = f"{op}_{name}_{short}_{knobs.tokens}_{knobs.most_left}x{knobs.most_right}"
                function = KernelFunction(
                    symbol, op, short, max_tokens=knobs.tokens, shared_bytes=knobs.shared_bytes(form),
                    archs=",".join(archs), block_rows=knobs.tiles, block_results=1, most_left=knobs.most_left,
                    most_right=knobs.most_right, knobs=" ".join(knobs.describe()), block_columns=knobs.columns(),
                )  # fmt: skip
                make = partial(warpgroup_lift.lift_planes_grouped, symbol, TIR_DTYPES[short], knobs, form)
                yield KernelTemplate(function, make)


TUNED_TEMPLATES: tuple[TunedTemplate, ...] = (
    TunedTemplate("sign_matmul_popcount", PopcountKnobs, lambda: POPCOUNT_KNOBS, popcount_templates),
    TunedTemplate("sign_matmul_binary", BinaryKnobs, lambda: BINARY_KNOBS, binary_templates),
    TunedTemplate("sign_matmul_tiled", TensorCoreKnobs, lambda: TENSOR_CORE_KNOBS, tensor_core_templates),
    TunedTemplate("lift_planes_grouped", GroupLiftKnobs, lambda: GROUP_LIFT_KNOBS, group_lift_templates),
    TunedTemplate("lift_planes", LiftKnobs, lambda: LIFT_KNOBS, lift_templates),
)
"""Every template whose knobs depend on the family of chips, in the order the runtime prefers them."""


def cuda_units(archs: tuple[str, ...], knobs: CudaKnobs, chosen: Chosen | None = None) -> tuple[Unit, ...]:
    """Every source of an object for these architectures (rising order); imports TVM."""
    units = [
        Unit("plain", archs, tuple(cuda_templates(knobs)), False),
        Unit("decode", archs, tuple(decode_templates()), True),
    ]
    families: dict[str, list[str]] = {}
    for arch in archs:
        families.setdefault(chip_family(arch), []).append(arch)
    for family, names in families.items():
        members, texts = tuple(names), []
        templates = list(fixed_templates(family, members))
        for tuned in TUNED_TEMPLATES:
            choices = (chosen or {}).get((family, tuned.op)) or tuned.choices().get(family, ())
            templates += tuned.make(family, members, choices)
            texts += [f"{family} {tuned.op}: {' '.join(choice.describe())}" for choice in choices]
        units.append(Unit(family, members, tuple(templates), True, tuple(texts)))
    return tuple(units)
