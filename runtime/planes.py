"""Operands of the tensor-core sign_matmul: z as bytes, from one lift launch or split from int16.

Planes are int8 (KB, 4, COLS, 64), two columns per token, and the sums of z (codegen/tensorcore_lift.py). They pass
between the fused ops of a loaded graph only (runtime/loader.py); `liftc.lift` itself returns z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from liftc.errors import LiftcError
from liftc.kernel_object import KernelFunction
from liftc.runtime.factors import PerFactors, factor_words
from liftc.runtime.kernels import Kernels
from liftc.spec import DTYPES

GROUP_COLUMNS = 256
LIFT_PARTS = 8
"""Parts of 8 rows that a block of the lift works on at a time."""

_REFUSALS = (TypeError, ValueError, RuntimeError)

Tensor = torch.Tensor


@dataclass(frozen=True)
class Planes:
    """z of tokens with the leading shape `lead` and `columns` values each, ready to be multiplied."""

    data: Tensor
    totals: Tensor
    lead: torch.Size
    columns: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.totals.shape[1]


@dataclass(frozen=True)
class Source:
    """What a lift kernel makes of its input before it lifts it, rounding to the dtype of x after every step.

    `op` is one of LIFT_OPS: x itself; gain (features,) * (x * rsqrt(mean x^2 + eps)); silu(gate) * up, where x holds
    gate and up one after the other; LayerNorm, rounded once, where `gain` (2 features,) holds gain and shift one after
    the other, or with `choice` 1 x * rsqrt(mean x^2 + eps) * (1 + gain), rounded once; gelu, by `choice` 0
    gelu(gate) * up, 1 the same with the tanh approximation, 2 gelu(x), 3 the same with the approximation.
    """

    op: str = "lift_planes"
    gain: Tensor | None = None
    eps: float = 0.0
    choice: int = 0

    @property
    def paired(self) -> bool:
        """Whether the input has two values, of gate and of up, for every feature."""
        return self.op == "lift_planes_gate" or (self.op == "lift_planes_gelu" and self.choice < 2)

    def fits(self, x: Tensor, features: int) -> bool:
        """Whether x (..., width) and the gain are of the shapes and dtype that so many features need."""
        gains = {"lift_planes_norm": features, "lift_planes_layer": features * (1 if self.choice else 2)}.get(
            self.op
        )
        choices = {"lift_planes_layer": 2, "lift_planes_gelu": 4}.get(self.op, 1)
        if x.shape[-1] != features * (2 if self.paired else 1) or self.choice not in range(choices):
            return False
        if self.gain is None or gains is None:
            return self.gain is None and gains is None
        return self.gain.dtype == x.dtype and self.gain.shape == (gains,)


LIFT_OPS = ("lift_planes", "lift_planes_norm", "lift_planes_gate", "lift_planes_layer", "lift_planes_gelu")
LIFTS = ("lift_planes_grouped", "lift_planes")
"""Kernels of the lift of x itself; of those for as many tokens and factors as large the first of these is preferred."""

CHEAP_APART = ("lift_planes_gelu",)
"""Forms whose operations are a launch or two of their own: those and a kernel for fewer tokens or smaller factors
mostly take less time than this form's kernel for any (docs/tuning.md)."""

PLAIN, GATED = Source(), Source("lift_planes_gate")
GELUS = tuple(Source("lift_planes_gelu", choice=choice) for choice in range(4))


class PlaneKernels:
    """The kernels of one loaded object that make planes; `most_tokens` is 0 where the device has none."""

    def __init__(self, kernels: Kernels, products: tuple[KernelFunction, ...]) -> None:
        """products: the kernels that read planes, in the order in which they are chosen, fewest tokens first."""
        functions = kernels.functions
        self._split = [functions[f.symbol] for f in kernels.of("split_z")]
        self._lift: dict[tuple[str, torch.dtype], list[tuple[KernelFunction, Callable[..., None]]]] = {}
        for op in LIFT_OPS:
            found = [f for form in (LIFTS if op == PLAIN.op else (op,)) for f in kernels.of(form)]
            for f in sorted(found, key=lambda f: (f.max_tokens, f.most_left * f.most_right)):
                self._lift.setdefault((op, DTYPES[f.dtype]), []).append((f, functions[f.symbol]))
        self._products = products
        self.most_tokens = products[-1].max_tokens if products and self._split else 0
        self._words = PerFactors(factor_words)
        self._ones: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._processors: dict[torch.device, int] = {}

    def lift_for(self, tokens: int, dtype: torch.dtype, t1: int = 0, t2: int = 0) -> KernelFunction | None:
        """The kernel that lifts so many tokens of x itself with factors of this size."""
        found = self._closest(PLAIN.op, dtype, tokens, t1, t2)
        return found and found[0]

    def empty(
        self, lead: torch.Size, tokens: int, columns: int, device: torch.device, parts: int = 1
    ) -> Planes:
        """Planes to be filled by `parts` blocks, with room for the columns of the product kernel that reads them."""
        reader = next(f for f in self._products if f.accepts(tokens, 0, 0))
        together = reader.plane_bytes
        shape = (-(-columns // GROUP_COLUMNS), GROUP_COLUMNS // together, 2 * reader.max_tokens, together)
        data = torch.empty(shape, dtype=torch.int8, device=device)
        return Planes(data, torch.empty(parts, tokens, dtype=torch.int32, device=device), lead, columns)

    def split(self, z: Tensor) -> Planes:
        """Planes of z int16 (tokens, K), 1 to most_tokens tokens."""
        tokens, columns = z.shape
        planes = self.empty(z.shape[:-1], tokens, columns, z.device)
        if z.data_ptr() % 16 or not z.is_contiguous():
            z = z.clone(memory_format=torch.contiguous_format)
        self._split[0](z, planes.data, planes.totals)
        return planes

    def lift(
        self, x: Tensor, activation_scale: Tensor | None, left: Tensor, right: Tensor, source: Source = PLAIN
    ) -> tuple[Planes, Tensor] | None:  # fmt: skip
        """Planes and z_scale f32 (..., 1) of what `source` makes of x, or None where no kernel takes this call."""
        width = x.shape[-1] if x.dim() else 0
        tokens = x.numel() // width if width else 0
        features = width // 2 if source.paired else width
        if not 0 < tokens <= self.most_tokens or left.dim() != 2 or right.dim() != 2:
            return None
        t1, t2 = left.shape[0], right.shape[0]
        if features > t1 * t2 or features % 8 or t2 % 8 or not left.dtype == right.dtype == torch.float32:
            return None
        if not source.fits(x, features):
            return None
        found = self._closest(source.op, x.dtype, tokens, t1, t2)
        if found is None or (
            source.op in CHEAP_APART and self._plain_is_closer(found[0], x.dtype, tokens, t1, t2)
        ):
            return None
        return self._lift_with(*found, tokens, x, activation_scale, left, right, source)

    def _closest(
        self, op: str, dtype: torch.dtype, tokens: int, t1: int, t2: int
    ) -> tuple[KernelFunction, Callable[..., None]] | None:
        """The kernel for the fewest tokens and the smallest factors of those that take them."""
        return next(
            (
                (spec, function)
                for spec, function in self._lift.get((op, dtype), ())
                if spec.accepts(tokens, 0, 0) and t1 <= spec.most_left and t2 <= spec.most_right
            ),
            None,
        )

    def _plain_is_closer(
        self, spec: KernelFunction, dtype: torch.dtype, tokens: int, t1: int, t2: int
    ) -> bool:
        plain = self.lift_for(tokens, dtype, t1, t2)
        size = (spec.max_tokens, spec.most_left * spec.most_right)
        return plain is not None and (plain.max_tokens, plain.most_left * plain.most_right) < size

    def _lift_with(
        self, spec: KernelFunction, function: Callable[..., None], tokens: int, x: Tensor,
        activation_scale: Tensor | None, left: Tensor, right: Tensor, source: Source,
    ) -> tuple[Planes, Tensor]:  # fmt: skip
        device, t1, (t2, lifted) = x.device, left.shape[0], right.shape
        left_words, right_words, bound = self._words(left, right)
        groups = -(-tokens // spec.block_results)
        if spec.block_columns:
            row_blocks, column_blocks = 1, -(-lifted // spec.block_columns)
        else:
            column_blocks = -(-right_words.shape[0] // spec.block_rows)
            # A block takes at least so many parts of 8 rows of T* x; the blocks of a cluster share the rows.
            most_row_blocks = -(-left_words.shape[0] // LIFT_PARTS)
            row_blocks = min(most_row_blocks, self._processors_of(device) // (groups * column_blocks))
            row_blocks = max(1, row_blocks // spec.cluster_blocks) * spec.cluster_blocks
        parts = row_blocks * column_blocks
        planes = self.empty(x.shape[:-1], tokens, t1 * lifted, device, parts)
        z_scale = torch.empty(tokens, 1, dtype=torch.float32, device=device)
        scale = (
            self._one_of(device, torch.float32) if activation_scale is None else _vectors(activation_scale)
        )
        gain = self._one_of(device, x.dtype) if source.gain is None else _vectors(source.gain)
        arguments = (_vectors(x.reshape(tokens, -1)), gain, scale, bound, left_words, right_words)
        sizes = (source.eps, groups * parts, row_blocks, t1, t2, lifted, source.choice)
        try:
            function(*arguments, planes.data, planes.totals, z_scale, *sizes)
        except _REFUSALS as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
            raise LiftcError(f"liftc.lift: the kernels refuse this call ({lines[-1]})") from None
        return planes, z_scale.view(*x.shape[:-1], 1)

    def _one_of(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        one = self._ones.get((device, dtype))
        if one is None:
            one = self._ones[device, dtype] = torch.ones(1, device=device, dtype=dtype)
        return one

    def _processors_of(self, device: torch.device) -> int:
        count = self._processors.get(device)
        if count is None:
            count = self._processors[device] = torch.cuda.get_device_properties(device).multi_processor_count
        return count


def _vectors(value: Tensor) -> Tensor:
    """Dense and at a multiple of 16 bytes."""
    value = value.contiguous()
    return value.clone() if value.data_ptr() % 16 else value
