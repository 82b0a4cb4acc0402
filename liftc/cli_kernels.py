"""Command line of kernels: tune and bench. Parses arguments and calls one driver function."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liftc.errors import LiftcError

Answer = dict[str, Any]


def _tune(a: argparse.Namespace) -> Answer:
    from liftc.driver import tune

    options = tune.TuneOptions(
        target=a.target, archs=tuple(a.arch or ()), cpu=a.cpu, batches=tuple(a.batch or (1, 4, 8, 16)),
        formats=tuple(a.format or ()), ops=tuple(a.op or ()), candidates=a.candidates, shared_bytes=a.shared_memory,
        pool_bytes=a.pool, budget=a.budget, records=a.records, again=a.again, processes=a.jobs,
        progress=not a.quiet,
    )  # fmt: skip
    if a.merge:
        if a.output is None or a.source or a.run_bundle or a.build_only:
            raise LiftcError("tune --merge: give records files and the file to write with -o, nothing else")
        return tune.tune_merge(a.merge, a.output)
    if a.run_bundle:
        if a.source or a.build_only:
            raise LiftcError("tune --run: takes a bundle and builds nothing; leave the rest out")
        if a.tracker:
            from liftc.driver.tune_rpc import run_on_tracker

            return run_on_tracker(a.run_bundle, a.tracker, a.key, options)
        return tune.tune_run(a.run_bundle, options)
    if a.serve:
        from liftc.driver.tune_rpc import serve

        if not a.tracker or a.source:
            raise LiftcError("tune --serve: name the tracker with --tracker HOST:PORT and nothing to tune")
        serve(a.tracker, a.key)
        return {}
    if not a.source:
        raise LiftcError("tune: name a model, a shape set such as llama-2-7b, or shapes such as 4096x4096")
    if a.build_only:
        if a.output is None:
            raise LiftcError("tune --build-only: name the bundle to write with -o")
        return tune.tune_build(a.source, a.output, options)
    return tune.tune(a.source, options)


def _bench(a: argparse.Namespace) -> Answer:
    from liftc.driver.bench import BenchOptions, bench_kernels, bench_records

    file = a.json if isinstance(a.json, Path) else None
    options = BenchOptions(
        shapes=tuple(a.shapes or ()),
        only=tuple(a.only or ()), formats=tuple(a.format or ()), batches=tuple(a.batch or ()), peers=not a.no_peers,
        prefill=a.prefill, shared_bytes=a.shared_memory, pool_bytes=a.pool, json=file, plot=a.plot,
        records=a.records, threads=a.threads, progress=not a.quiet,
    )  # fmt: skip
    a.json = a.json is True  # with a file the answer on stdout stays a table
    return bench_records(a.kernels, options) if a.what == "records" else bench_kernels(a.kernels, options)


def add_commands(commands: Any, command: Callable[..., Any]) -> None:
    """Add `tune` and `bench` to the parser; `command` makes a subcommand with the common options."""
    t = command(commands, "tune", _tune, "measure which knobs of the kernels are best on a device")
    t.add_argument("source", nargs="?", metavar="MODEL_OR_SHAPES",
                   help="artifact, model folder, shape set (llama-2-70b), file of shapes, or OCxIC,OCxIC")  # fmt: skip
    t.add_argument("--target", choices=("cuda", "llvm"), default="cuda")
    t.add_argument("-arch", "--arch", action="append", metavar="sm_XX", help="the architecture to tune for")
    t.add_argument("--cpu", default="native", help="CPU level of --target llvm")
    t.add_argument(
        "--budget", type=_seconds, default=600.0, metavar="TIME", help="of measuring: 90s, 10m (default)"
    )
    t.add_argument(
        "--batch", type=_count, action="append", metavar="N", help="repeatable (default 1, 4, 8, 16)"
    )
    t.add_argument("--format", action="append", metavar="LQ-D/d", help="repeatable (default LQ-77/32)")
    t.add_argument(
        "--op", action="append", help="only this kernel, for example sign_matmul_tiled; repeatable"
    )
    t.add_argument(
        "--candidates", type=_count, default=12, metavar="N", help="most per kernel and batch (default 12)"
    )
    t.add_argument(
        "--shared-memory", type=_size, metavar="SIZE", help="most shared memory of a block, such as 99K"
    )
    t.add_argument(
        "--pool", type=_size, metavar="SIZE", help="distinct signs per timing (default 1.5G, CPU 256M)"
    )
    t.add_argument(
        "--jobs", type=_count, default=0, metavar="N", help="compiling processes (default: the cores)"
    )
    t.add_argument("--again", action="store_true", help="also measure what the records have already")
    t.add_argument("--records", type=Path, metavar="DIR", help="folder of records (default: LIFTC_RECORDS)")
    how = t.add_mutually_exclusive_group()
    how.add_argument(
        "--build-only", action="store_true", help="compile a bundle to measure elsewhere; no GPU"
    )
    how.add_argument("--run", type=Path, dest="run_bundle", metavar="BUNDLE", help="measure a bundle; no TVM")
    how.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="merge records files into -o")
    how.add_argument("--serve", action="store_true", help="offer this machine to --tracker")
    t.add_argument("--tracker", metavar="HOST:PORT", help="TVM RPC tracker, with --run or --serve")
    t.add_argument("--key", default="liftc", help="which machines of the tracker (default liftc)")
    t.add_argument("-o", "--output", type=Path, help="bundle or records file to write")

    text = "time the kernels of an artifact or object on this device"
    b = commands.add_parser("bench", help=text, description=text)
    b.set_defaults(run=_bench)
    b.add_argument("--json", nargs="?", const=True, default=False, type=Path, metavar="FILE",
                   help="write every record to FILE as a JSON list; without FILE print one JSON object")  # fmt: skip
    b.add_argument("-q", "--quiet", action="store_true", help="no progress")
    b.add_argument("what", choices=("kernels", "records"), help="measure, or show a file of records")
    b.add_argument("kernels", type=Path, metavar="ARTIFACT|KERNELS.so|FILE.jsonl")
    b.add_argument("--shapes", action="append", metavar="SHAPES",
                   help="as of tune, with formats of its own as NAME@77/32,64/32; repeatable (default "
                   "llama-2-70b@77/32,64/32,96/32 and llama-2-7b; CPU: smollm2-135m)")  # fmt: skip
    b.add_argument("--format", action="append", metavar="LQ-D/d", help="repeatable (default LQ-77/32)")
    b.add_argument(
        "--batch", type=_count, action="append", metavar="N", help="repeatable (default 1, 4, 8, 16)"
    )
    b.add_argument(
        "--prefill", type=_whole, default=2048, metavar="N", help="tokens of prefill rows, 0 for none"
    )
    b.add_argument(
        "--only",
        action="append",
        choices=("chains", "shapes", "fused", "peers", "prefill", "decode"),
        help="repeatable",
    )
    b.add_argument(
        "--no-peers", action="store_true", help="leave out dense, unpacked and other people's kernels"
    )
    b.add_argument(
        "--shared-memory", type=_size, metavar="SIZE", help="use only kernels within this limit: 99K, 163K"
    )
    b.add_argument(
        "--pool", type=_whole_size, metavar="SIZE", help="distinct signs per timing, 0 for operands in cache"
    )
    b.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: LIFTC_NUM_THREADS)")
    b.add_argument("--plot", type=Path, metavar="FILE", help="roofline plot (.png or .svg; needs matplotlib)")
    b.add_argument("--records", type=Path, metavar="DIR", help="also append the records to this folder")


def _count(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 1 << 20:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _whole(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]?)i?B?", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 99K or 1.5G, got {text!r}")
    return int(float(match[1]) * 1024 ** " KMG".index(match[2].upper() or " "))


def _whole_size(text: str) -> int:
    return 0 if text == "0" else _size(text)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected a time such as 90s or 10m, got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
