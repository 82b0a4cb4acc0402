"""Calls of the device functions in codegen/warpgroup_device.py, to be written inside a TIRx function."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from liftc.codegen import tensorcore_device as device
from liftc.codegen import warpgroup_device as group_device


def barrier_init(barrier: Any, arrivals: Any) -> Any:
    """Make a barrier whose phases take so many arrivals."""
    return T.cuda.func_call("liftc_barrier_init", barrier, arrivals, source_code=device.BARRIER_INIT)


def fence_init() -> Any:
    """Show the barriers made to the copy engine."""
    return T.cuda.func_call("liftc_fence_init", source_code=group_device.FENCE_INIT)


def barrier_expect(barrier: Any, count: Any) -> Any:
    """Arrive, and keep the phase open until so many bytes have been copied."""
    return T.cuda.func_call("liftc_barrier_expect", barrier, count, source_code=group_device.BARRIER_EXPECT)


def warp_signal(barrier: Any) -> Any:
    """One thread of the warp arrives."""
    return T.cuda.func_call("liftc_warp_signal", barrier, source_code=group_device.WARP_SIGNAL)


def barrier_await(barrier: Any, parity: Any) -> Any:
    """Wait until the phase of this parity is over."""
    return T.cuda.func_call("liftc_barrier_await", barrier, parity, source_code=group_device.BARRIER_AWAIT)


def bulk_copy(to: Any, source: Any, count: Any, barrier: Any) -> Any:
    """One thread copies `count` bytes, a multiple of 16, into shared memory; the barrier counts them."""
    return T.cuda.func_call("liftc_bulk_copy", to, source, count, barrier, source_code=group_device.BULK_COPY)


def bits_of_bytes(at: Any, apart: Any) -> Any:
    """Turn eight vectors of bytes into bits where they lie."""
    return T.cuda.func_call("liftc_bits_of_bytes", at, apart, source_code=group_device.BITS_OF_BYTES)


def fence_shared() -> Any:
    """Let the tensor cores see what this thread has written to shared memory."""
    return T.cuda.func_call("liftc_fence_shared", source_code=group_device.FENCE_SHARED)


def cluster_arrive() -> Any:
    """Tell the cluster that this thread has prepared its part of shared memory."""
    return T.cuda.func_call("liftc_cluster_arrive", source_code=group_device.CLUSTER_ARRIVE)


def cluster_await() -> Any:
    """Wait until all threads of the cluster have arrived."""
    return T.cuda.func_call("liftc_cluster_await", source_code=group_device.CLUSTER_AWAIT)


def add_to_peer(at: Any, value: Any, rank: Any, barrier: Any) -> Any:
    """Add a word to another block's shared memory, whose barrier counts the bytes."""
    return T.cuda.func_call(
        "liftc_add_to_peer", at, value, rank, barrier, source_code=group_device.ADD_TO_PEER
    )


def group_sync(barrier: int, threads: Any) -> Any:
    """A numbered barrier of so many threads of a block."""
    return T.cuda.func_call(f"liftc_group_sync_{barrier}", threads, source_code=_group_barrier(barrier))


def group_arrive(barrier: int, threads: Any) -> Any:
    """Count as one of the threads of a numbered barrier, and go on."""
    return T.cuda.func_call(f"liftc_group_arrive_{barrier}", threads, source_code=_group_barrier(barrier))


def _group_barrier(number: int) -> str:
    name, source = f"LIFTC_GROUP_{number}", group_device.GROUP_BARRIER.replace("NUMBER", str(number))
    return f"\n#ifndef {name}\n#define {name}\n{source}#endif\n"


def barrier_test(barrier: Any, parity: Any, lane: Any) -> Any:
    """Whether the phase of this parity is over, 0 or 1, the same for all lanes."""
    return T.cuda.func_call(
        "liftc_barrier_test",
        barrier,
        parity,
        lane,
        source_code=group_device.BARRIER_TEST,
        return_type="int32",
    )


def load_word(at: Any) -> Any:
    """int32 that the kernel before wrote, from L2."""
    return T.cuda.func_call("liftc_load_word", at, source_code=device.LOAD_WORD, return_type="int32")


def dependent_start() -> Any:
    """Let the next kernel start as soon as there is room for it."""
    return T.cuda.func_call("liftc_dependent_start", source_code=device.DEPENDENT_START)


def dependent_wait() -> Any:
    """Wait until everything the kernels before wrote is visible."""
    return T.cuda.func_call("liftc_dependent_wait", source_code=device.DEPENDENT_WAIT)


def launch_registers(count: int) -> Any:
    """Say how many registers each thread has at launch (build_cuda.registers_at_launch)."""
    return T.cuda.func_call("liftc_launch_registers", count, source_code=group_device.LAUNCH_REGISTERS)


def touch(base: Any, at: Any, kind: Any) -> Any:
    """Ask for an entry of a vector to be brought into L2."""
    return T.cuda.func_call("liftc_touch", base, at, kind, source_code=device.TOUCH)


def load_four(base: Any, at: Any, count: Any, kind: Any, out: Any) -> Any:
    """Up to four values that are added to results into zeroed words."""
    source = device.ADDENDS + group_device.LOAD_FOUR
    return T.cuda.func_call("liftc_load_four", base, at, count, kind, out, source_code=source)
