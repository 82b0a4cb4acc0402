"""Timing on one device: medians of CUDA graph replays or of calls, the read ceiling, and facts about the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from liftc.errors import TargetError
from liftc.runtime.kernels import Kernels

_WARM_BYTES = 1.5e12
_CPU_SECONDS = 0.1
_MOST_CPU_SECONDS = 2.0
_FEWEST = 3


class Clock:
    """Times work on a device. The median is over `repeats` after two runs for warming up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def microseconds(self, run: Callable[[], Any], repeats: int = 9, graph: bool = True) -> float:
        """Median time of `run`; on a GPU of replays of it as a CUDA graph, captured after one plain call."""
        if self.device.type != "cuda":
            return statistics.median(_wall(run, repeats))
        return self._events(self._captured(run).replay if graph else run, repeats)

    def _captured(self, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph

    def _events(self, run: Callable[[], Any], repeats: int) -> float:
        times: list[float] = []
        for index in range(repeats + 2):
            begin, end = _event(), _event()
            begin.record()
            run()
            end.record()
            end.synchronize()
            if index >= 2:
                times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def read_ceiling(self, kernels: Kernels, pool: torch.Tensor) -> float:
        """GB/s of the best of a few readings of `pool` that do nothing else; warms a GPU's clocks first."""
        if self.device.type != "cuda":
            flat = pool.view(torch.float32)
            return float(pool.nbytes / min(_wall(partial(torch.sum, flat), 9)) / 1e3)
        functions = kernels.of("read_ceiling")
        if not functions:
            raise TargetError(
                f"{kernels.object.path.name} has no kernel that measures reading; compile again"
            )
        read = kernels.functions[functions[0].symbol]
        seen = torch.zeros(1, dtype=torch.int32, device=self.device)
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        for _ in range(max(1, int(_WARM_BYTES / pool.nbytes))):
            read(pool, seen, 2 * processors)
        times = [self._events(partial(read, pool, seen, n * processors), 9) for n in (1, 2, 3, 4, 8)]
        return float(pool.nbytes / min(times) / 1e3)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _wall(run: Callable[[], Any], repeats: int) -> list[float]:
    """Microseconds of single calls, or of short series of them where a call takes less than 200 microseconds."""
    run()
    begin = time.perf_counter()
    run()
    once = max(time.perf_counter() - begin, 1e-7)
    series = max(1, min(1000, int(2e-4 / once)))
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 100:
        spent = time.perf_counter() - start
        if (len(times) >= repeats and spent > _CPU_SECONDS) or (
            len(times) >= _FEWEST and spent > _MOST_CPU_SECONDS
        ):
            break
        begin = time.perf_counter()
        for _ in range(series):
            run()
        times.append((time.perf_counter() - begin) / series * 1e6)
    return times


def has_gpu() -> bool:
    """Whether torch finds a CUDA GPU."""
    return torch.cuda.is_available()


def device_name(device: torch.device) -> str:
    """What the maker calls the GPU, or the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def machine_facts(device: torch.device) -> dict[str, str]:
    """Fields of a record that describe the machine and the time."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "driver": _driver(device),
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _driver(device: torch.device) -> str:
    """Version of the NVIDIA kernel driver, of the Linux kernel for a CPU, or "unknown"."""
    path = "/proc/driver/nvidia/version" if device.type == "cuda" else "/proc/version"
    try:
        words = Path(path).read_text().split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
