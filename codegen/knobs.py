"""Schedule choices of the generated kernels. They change speed, never results; which are used: default_knobs.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class CpuKnobs:
    """token_tiles: tokens that share one pass over the signs, one kernel each, largest first, ending in 1.
    pair_lanes: int32 lanes of a register for the column-pair form of sign_matmul (4 for SSE, 8 for AVX2), or
    0 for the mask form (AVX-512). row_lanes: rows of a word (a divisor of 32) that the mask form sums in one
    pass over the columns.
    lift_rows, lift_lanes: register tile of the lift's two products.
    """

    token_tiles: tuple[int, ...] = (4, 1)
    pair_lanes: int = 0
    row_lanes: int = 32
    lift_rows: int = 6
    lift_lanes: int = 16

    def describe(self) -> tuple[str, ...]:
        """One text "name=value" per knob."""
        return tuple(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class CudaKnobs:
    """column_slices: warps of a block that split the lifted columns of one word row. threads: block size of
    the element-wise kernels. lift_threads: columns that a block of the lift's products computes.
    """

    column_slices: int = 8
    threads: int = 256
    lift_threads: int = 64

    def describe(self) -> tuple[str, ...]:
        """One text "name=value" per knob."""
        return tuple(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class TensorCoreKnobs:
    """Choices of the tensor-core sign_matmul (codegen/tensorcore_sign.py).

    tokens: the most tokens of a call. warps: of a block. ring: tiles (or pairs) a warp has in flight, one more
    than it waits for. row_blocks: blocks of 16 rows, 1 or 2, that share one load of z. sets: accumulator sets per
    16 rows and 4 tokens, 1, 2, 4 or 8 (fewer: fewer registers, more shifts). chunk_blocks: blocks of 256 columns
    in a chunk of z, z_buffers: chunks in shared memory at a time. block_rows: most blocks of 16 rows of one
    block. prefetch_tiles: tiles per warp asked into L2 behind the ring. first_tiles: tiles of the ring that a warp asks
    for at once, each of the others when one has come (0: all at once), so that other loads wait less. dependent_launch:
    start while the kernel before still runs (sm_90 on). pad_bytes: unused shared memory, to keep blocks apart.
    """

    tokens: int = 1
    warps: int = 16
    ring: int = 8
    row_blocks: int = 1
    sets: int = 8
    chunk_blocks: int = 40
    z_buffers: int = 2
    block_rows: int = 32
    prefetch_tiles: int = 0
    first_tiles: int = 0
    dependent_launch: bool = False
    pad_bytes: int = 0

    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        planes = self.z_buffers * self.chunk_blocks * self.tokens * 512
        ring = self.warps * self.ring * self.row_blocks * 512
        sums = -(-self.tokens * (self.block_rows * 16 + 8) * 4 // 16) * 16 + self.block_rows * 64
        totals = 2 * -(-self.tokens // 4) * 16
        return planes + ring + sums + totals + -(-self.z_buffers // 2) * 16 + self.pad_bytes

    def describe(self) -> tuple[str, ...]:
        """One text "name=value" per knob."""
        return tuple(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class PopcountKnobs:
    """Choices of the binary tensor-core sign_matmul (codegen/tensorcore_popcount.py).

    tokens: the most tokens of a call. warps: of a block, at least one per token. ring: tiles a warp has in flight.
    chunk_blocks: blocks of 256 columns whose z is in shared memory as bits at a time. block_rows: most blocks of 16
    rows of one block. early_tiles: tiles of the ring that a warp asks for before z has come (0: all), first_tiles:
    those of them at once, each of the others when one has come (0: all at once), so that other loads wait less.
    dependent_launch: start while the kernel before still runs (sm_90 on). pad_bytes: unused shared memory, to keep
    blocks apart.
    """

    tokens: int = 1
    warps: int = 24
    ring: int = 10
    chunk_blocks: int = 104
    block_rows: int = 32
    early_tiles: int = 0
    first_tiles: int = 0
    dependent_launch: bool = False
    pad_bytes: int = 0

    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        bits = self.chunk_blocks * self.tokens * 512
        sums = -(-self.tokens * (self.block_rows * 16 + 8) * 4 // 16) * 16
        tiles = self.warps * (self.ring * 512 + 16)
        return bits + tiles + sums + 2 * -(-self.tokens // 4) * 16 + self.pad_bytes

    def describe(self) -> tuple[str, ...]:
        """One text "name=value" per knob."""
        return tuple(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class BinaryKnobs:
    """Choices of the binary warp-group sign_matmul (codegen/tensorcore_binary.py).

    tokens: the most tokens of a call, a multiple of 4. teams: of warp groups, each with its own tiles. lanes: warp
    groups of a team, each with its part of the tokens (whole fours). stage_blocks: blocks of 256 columns of a stage.
    ring: stages of tiles of four row blocks that a team has in flight, at most 32; first_stages: those of them that it
    asks for at once, each of the others when one has come (0: all at once), so that loads of the lift wait less.
    prefetch: stages behind the ring that a team asks into L2 while z is awaited. cutters: warps that cut z into bits.
    z_stages: stages of z in shared memory, at most 32. block_rows: most blocks of 16 rows of one cluster. split: blocks
    of a cluster, each with its part of the columns: 1, 2 or 4. multiply_registers, helper_registers: of a thread of the
    warps that multiply and of the others, whose number is then a multiple of 4 (0: as many as the compiler gives).
    dependent_launch: start while the kernel before still runs. pad_bytes: unused shared memory, to keep blocks apart.
    """

    tokens: int = 16
    teams: int = 2
    lanes: int = 1
    stage_blocks: int = 4
    ring: int = 4
    cutters: int = 5
    z_stages: int = 4
    block_rows: int = 56
    split: int = 2
    first_stages: int = 1
    prefetch: int = 0
    multiply_registers: int = 0
    helper_registers: int = 0
    dependent_launch: bool = True
    pad_bytes: int = 0

    def threads(self) -> int:
        """Of a block: warp groups, a warp that fills the ring of each team, one that copies z, and the cutters."""
        return 32 * (self.teams * (4 * self.lanes + 1) + 1 + self.cutters)

    def launch_registers(self) -> int:
        """Registers of a thread at launch: enough for what those that multiply and the others then take."""
        multiply = self.teams * self.lanes * 128
        both = multiply * self.multiply_registers + (self.threads() - multiply) * self.helper_registers
        return -(-both // (8 * self.threads())) * 8

    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        bits = self.z_stages * self.stage_blocks * self.tokens * 512
        ring = self.teams * self.ring * self.stage_blocks * 2048
        rows = -(-self.block_rows // 4) * 64
        sums = self.tokens * (rows + 8) * 4
        scales = 2 * -(-self.tokens // 4) * 16 + (rows // self.split + 16) * 4
        barriers = [self.z_stages] * 3 + [self.teams * self.ring] * 2 + [self.teams]
        asked = self.teams * 64
        barriers += [1]  # for sums from the other blocks of the cluster
        return bits + ring + sums + scales + asked + sum(-(-n // 2) * 16 for n in barriers) + self.pad_bytes

    def describe(self) -> tuple[str, ...]:
        """One text "name=value" per knob."""
        return tuple(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class LiftKnobs:
    """Choices of the lift in one launch (codegen/tensorcore_lift.py).

    tokens: the most of a call. group: tokens of a block. tiles: 16-column tiles of T* x of a block. units: blocks of 8
    rows of X, and then of T* x, of a warp at a time; ahead: 32-column pieces of X whose loads are in flight together.
    left_kept: 16-column operands of left that are in shared memory before x is there, left_depth: others in flight.
    cluster: blocks, each with its rows of X and T* x, that share the product with right (sm_90 on).
    most_left, most_right: largest factors. blocks_per_processor: for which registers are saved. trigger: when the next
    kernel may start: 0 at once, 1 when x is read, 2 when T* x is computed.
    """

    tokens: int = 1
    group: int = 1
    tiles: int = 1
    units: int = 1
    ahead: int = 4
    left_depth: int = 4
    warps: int = 8
    most_left: int = 256
    most_right: int = 256
    blocks_per_processor: int = 4
    trigger: int = 0
    dependent_launch: bool = False
    left_kept: int = 0
    cluster: int = 1

    def takes_any(self) -> bool:
        """Whether these are knobs for factors of every usual size."""
        return min(self.most_left, self.most_right) >= 256

    def direct(self) -> bool:
        """Whether lanes store their results one by one: shortest for one token, where little is stored."""
        return self.tokens * self.units * self.tiles == 1

    def right_bytes(self) -> int:
        """Shared memory of the operands of right, and then of z on its way out."""
        right = self.tiles * -(-self.most_right // 32) * 2048
        return max(right, self.warps * self.group * 16 * (self.tiles * 16 + 4))

    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        mixed = self.group * self.tiles * -(-self.most_left // 16) * 1024
        kept = self.warps * self.units * self.left_kept * 512
        squares = -(-self.group * self.warps * (self.cluster + 1) // 4) * 16
        places = self.warps * 512 if self.direct() else 0
        return self.right_bytes() + mixed + kept + places + squares + -(-self.group // 4) * 16 + 16

    def describe(self) -> tuple[str, ...]:
        """One text "name=value" per knob."""
        return tuple(f"{name}={value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class GroupLiftKnobs:
    """Choices of the warp-group lift (codegen/warpgroup_lift.py).

    tokens: the most of a call. tiles: of 16 columns of T* x that a block computes. most_left, most_right: largest
    factors. copied: x comes to shared memory by the copy engine instead of to registers. registers: the most of a
    thread (0: as many as there are). trigger: when the next kernel may start: 0 at once, 1 when x is read, 2 when T* x
    is computed.
    """

    tokens: int = 4
    tiles: int = 2
    most_left: int = 128
    most_right: int = 128
    copied: bool = True
    registers: int = 0
    trigger: int = 0
    dependent_launch: bool = True

    def columns(self) -> int:
        """Columns of T* x that a block stores: whole words from where they begin in any row."""
        return self.tiles * 16 - 4

    def pieces(self) -> int:
        """Pieces of 32 features of a row of X."""
        return -(-self.most_right // 32)

    def threads(self) -> int:
        """Of a block: a warp group for every 64 rows."""
        return 128 * -(-self.most_left // 64)

    def shared_bytes(self, form: str = "plain") -> int:
        """Dynamic shared memory of a block of a form of the kernel."""
        right = self.tiles * self.pieces() * 2048
        mixed = self.threads() * self.tiles * 32
        copies = self.threads() * self.most_right * (2 if form == "gate" else 1) if self.copied else 0
        return right + mixed + copies + -(-self.threads() // 128) * 64 + 16

    def describe(self) -> tuple[str, ...]:
        """One text "name=value" per knob."""
        return tuple(f"{name}={value}" for name, value in asdict(self).items())
