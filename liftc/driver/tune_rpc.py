"""Sweeps on other machines through TVM's RPC tracker: files and answers travel by RPC, measuring is ours.

`liftc tune --serve` on the machine with the GPU registers with the tracker; `liftc tune --run BUNDLE --tracker`
sends a bundle to any machine of that key and gets its records. A tracker trusts everyone who reaches it, and anyone on
its network can run code on its servers: it belongs on networks of one's own only.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from liftc import env
from liftc.bundle import read_bundle
from liftc.driver.tune import TuneOptions, sweep_answer
from liftc.driver.tune_run import Sweep, run_bundle
from liftc.errors import LiftcError, TargetError
from liftc.kernel_records import append_records, parse_record, records_file

FUNCTION = "liftc.tune.run"
_SLACK_SECONDS = 300


def serve(tracker: str, key: str) -> None:
    """Offer this machine to a tracker until interrupted; raises LiftcError."""
    rpc = _import_rpc()
    host, port = _address(tracker)
    try:
        server = rpc.Server(
            "0.0.0.0", 9190, 9290, key=key, tracker_addr=(host, port), server_init_callback=_register
        )
    except (OSError, RuntimeError) as error:
        raise TargetError(
            f"tune --serve: cannot start a server for the tracker {tracker} ({error})"
        ) from None
    print(
        f"liftc tune: serving as {key!r} on port {server.port} for {tracker}; end with Ctrl-C",
        file=sys.stderr,
    )
    try:
        while True:
            time.sleep(3600)
    finally:
        server.terminate()


def run_on_tracker(folder: Path, tracker: str, key: str, options: TuneOptions) -> dict[str, Any]:
    """Measure a bundle on a machine of the tracker and append its records here too; raises LiftcError."""
    host, port = _address(tracker)
    rpc = _import_rpc()
    bundle = read_bundle(folder)
    try:
        session = rpc.connect_tracker(host, port).request(
            key, priority=1, session_timeout=options.budget + _SLACK_SECONDS
        )
        for path in sorted(p for p in folder.iterdir() if p.is_file()):
            session.upload(bytearray(path.read_bytes()), target=path.name)
        answer = json.loads(session.get_function(FUNCTION)(float(options.budget), int(options.again)))
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        line = next((part for part in str(error).splitlines() if part.strip()), type(error).__name__)
        raise TargetError(
            f"tune --tracker: no machine {key!r} of {tracker} measured the bundle ({line})"
        ) from None
    if "error" in answer:
        raise LiftcError(answer["error"])
    records = tuple(parse_record(json.dumps(record)) for record in answer["records"])
    file = records_file(options.records or env.records_dir(), answer["device"])
    append_records(file, records)
    sweep = Sweep(file, answer["device"], answer["ceiling"], answer["measured"], answer["skipped"], answer["left"],
                  answer["seconds"], records)  # fmt: skip
    return sweep_answer(bundle, sweep)


def _register() -> None:
    """Make the function known that clients call; run by the server in its own process."""
    import tvm_ffi

    tvm_ffi.register_global_func(FUNCTION, _measure, override=True)


def _measure(budget: float, again: int) -> str:
    """Measure the bundle whose files came with this connection; JSON text of the sweep or of an error."""
    import tvm_ffi

    folder = Path(str(tvm_ffi.get_global_func("tvm.rpc.server.workpath")("plan.json"))).parent
    with tempfile.TemporaryDirectory(prefix="liftc-tune-") as scratch:
        try:
            sweep = run_bundle(folder, Path(scratch), budget=budget, again=bool(again))
            append_records(records_file(env.records_dir(), sweep.device), sweep.records)
        except LiftcError as error:
            return json.dumps({"error": str(error)})
    return json.dumps({
        "records": [r.to_json() for r in sweep.records], "device": sweep.device, "ceiling": sweep.ceiling,
        "measured": sweep.measured, "skipped": sweep.skipped, "left": sweep.left, "seconds": sweep.seconds,
    })  # fmt: skip


def _address(tracker: str) -> tuple[str, int]:
    host, _, port = tracker.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise LiftcError(f"tracker {tracker!r}: write it as HOST:PORT, for example 127.0.0.1:9190")
    return host, int(port)


def _import_rpc() -> Any:
    try:
        import tornado  # noqa: F401
        from tvm import rpc
    except ImportError:
        raise LiftcError(
            "the RPC tracker needs TVM and tornado: run pip install 'liftc[quantize]' tornado"
        ) from None
    return rpc
