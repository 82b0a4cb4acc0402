"""liftc tune and liftc bench kernels on this CPU: bundles, crashes, budgets, damage, and the choices they lead to."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm", reason="candidates are built with TVM")
from liftc import cli
from liftc.bundle import Bundle, BundleCandidate, Work, object_hashes, read_bundle, write_bundle
from liftc.codegen.build import native_cpu_level
from liftc.codegen.build_cuda import assembler_resources
from liftc.driver import tune_run
from liftc.driver.bench import BenchOptions, bench_kernels
from liftc.driver.kernels import choose_kernels
from liftc.driver.shapes import MODELS, find_work
from liftc.driver.tune import TuneOptions, build_bundle
from liftc.driver.tune import tune_run as run_command
from liftc.errors import LiftcError, RecordError
from liftc.kernel_object import KernelFunction, KernelObject, cpu_features, file_sha256
from liftc.kernel_records import read_records

LEVEL = native_cpu_level()
OPTIONS = TuneOptions(
    target="llvm",
    batches=(1, 2),
    formats=("24/10",),
    candidates=2,
    pool_bytes=1 << 18,
    processes=2,
    progress=False,
)
SHAPES = "48x40,33x20"

BAD_KERNELS = """
#include <stdlib.h>
#include <unistd.h>
void liftc_use_openmp(int on) { (void)on; }
int liftc_set_num_threads(int count) { return count; }
int __tvm_ffi_silent(void *self, void *args, int count, void *result) { return 0; }
int __tvm_ffi_aborts(void *self, void *args, int count, void *result) { abort(); }
int __tvm_ffi_hangs(void *self, void *args, int count, void *result) { sleep(600); return 0; }
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teams of threads wait for each other for long on a busy machine."""
    monkeypatch.setenv("LIFTC_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning") / "bundle"
    build_bundle(SHAPES, folder, OPTIONS)
    return folder


def test_a_bundle_holds_what_was_asked_for_and_nothing_to_unpickle(bundle: Path) -> None:
    made = read_bundle(bundle)
    assert made.work == (Work("LQ-24/10", 48, 40), Work("LQ-24/10", 33, 20)) and made.batches == (1, 2)
    assert [c.op for c in made.candidates] == ["sign_matmul", "lift"] * 2 and made.arch == LEVEL
    assert {p.suffix for p in bundle.iterdir()} == {".so", ".json"}
    assert not any(c.refused for c in made.candidates)


def test_measuring_needs_no_tvm_and_loses_nothing(bundle: Path, tmp_path: Path) -> None:
    probe = (
        "import sys\n"
        "for name in ('tvm', 'transformers', 'gguf', 'networkx'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from liftc.driver.tune import TuneOptions, tune_run\n"
        f"answer = tune_run(Path({str(bundle)!r}), TuneOptions(records=Path({str(tmp_path)!r}), budget=600))\n"
        "print(answer['text'])\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.jsonl")
    found = read_records(file)
    # sign_matmul: two shapes and a chain, lift: two widths and a chain; two batches, two candidates each
    assert len(found) == 2 * 2 * (3 + 3) and {r.status for r in found} == {"ok"}
    assert {(r.out_features, r.in_features) for r in found if r.kernel == "lift" and not r.chain} == {
        (0, 40),
        (0, 20),
    }
    assert all(r.arch == LEVEL and r.gigabytes_per_second and r.fraction_of_ceiling for r in found)
    assert "4 candidates measured, 0 known before, 0 left" in done.stdout

    again = run_command(bundle, replace(OPTIONS, records=tmp_path))
    assert (again["measured"], again["skipped"]) == (0, 4) and read_records(file) == found
    short = run_command(bundle, replace(OPTIONS, records=tmp_path, again=True, budget=1e-3))
    assert (short["measured"], short["left"]) == (1, 3) and len(read_records(file)) == len(found) + 6

    choices = choose_kernels("llvm", (), "native", [Work("LQ-24/10", 48, 40)], tmp_path)
    assert [("best of 2" in text, "these shapes" in text) for text in choices.said] == [(True, True)] * 2
    fastest = min(
        (r for r in found if r.kernel == "sign_matmul" and r.out_features == 48),
        key=lambda r: r.microseconds or 0,
    )
    assert choices.cpu is not None and fastest.microseconds


def bad_bundle(bundle: Path, folder: Path, symbols: tuple[str, ...]) -> Bundle:
    """The bundle with candidates of sign_matmul that misbehave in front of a good one."""
    shutil.copytree(bundle, folder)
    made = read_bundle(bundle)
    source = folder / "bad.c"
    source.write_text(BAD_KERNELS)
    for symbol in symbols:
        path = folder / f"{symbol}.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", str(source), "-o", str(path)], check=True)
        descriptor = KernelObject(
            path=path, target="llvm", archs=(LEVEL,), ptx="", features=cpu_features(LEVEL), toolchain="gcc",
            kernel_version=made.kernel_version, knobs=(), functions=(KernelFunction(symbol, "sign_matmul", "f32"),),
            sha256=file_sha256(path),
        )  # fmt: skip
        descriptor.descriptor.write_text(descriptor.to_json())
    source.unlink()
    good = made.candidates[0]
    bad = tuple(replace(good, file=f"{s}.so", symbols=(s,), knobs={**good.knobs, "lift_rows": 50 + i})
                for i, s in enumerate(symbols))  # fmt: skip
    never = BundleCandidate(
        "sign_matmul", {**good.knobs, "lift_rows": 99}, 9, "", (), "it does not compile: no"
    )
    objects = [made.base, good.file, *(f"{s}.so" for s in symbols)]
    made = replace(made, candidates=(*bad, never, good), sha256=object_hashes(folder, objects))
    write_bundle(folder, made)
    return made


def test_candidates_that_are_wrong_crash_or_hang_cost_only_themselves(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_bundle(bundle, tmp_path / "bad", ("silent", "aborts", "hangs"))
    monkeypatch.setattr(tune_run, "CANDIDATE_SECONDS", 10.0)
    answer = run_command(tmp_path / "bad", replace(OPTIONS, records=tmp_path / "records"))
    found = read_records(Path(answer["file"]))
    reasons = {r.knobs["lift_rows"]: (r.status, r.reason) for r in found if r.status != "ok"}
    assert reasons[50] == ("wrong", reasons[50][1]) and "batch" in reasons[50][1]
    assert reasons[51][0] == "failed" and "signal 6" in reasons[51][1]
    assert reasons[52] == ("failed", "no answer within 10 s")
    assert reasons[99] == ("refused", "it does not compile: no")
    assert [r.status for r in found].count("ok") == 6 and answer["measured"] == 5
    choices = choose_kernels("llvm", (), "native", [Work("LQ-24/10", 48, 40)], tmp_path / "records")
    assert choices.cpu is not None and choices.cpu.lift_rows < 50


@pytest.mark.parametrize("slowest, seconds", [(0.0, 60.0), (0.2, 30.0), (4.5, 45.0), (40.0, 60.0)])
def test_patience_with_a_candidate_follows_the_others(slowest: float, seconds: float) -> None:
    assert tune_run._patience(slowest) == seconds


def test_damaged_bundles_are_refused(bundle: Path, tmp_path: Path) -> None:
    def damaged(name: str, change: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(bundle, folder)
        change(folder)
        return folder

    def edit(folder: Path, sign: bool = False, **values: Any) -> None:
        data = json.loads((folder / "plan.json").read_text())
        data.update(values)
        if sign:
            del data["digest"]
            data["digest"] = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        (folder / "plan.json").write_text(json.dumps(data))

    candidate = json.loads((bundle / "plan.json").read_text())["candidates"][0]
    cases = {
        "digest": (lambda f: edit(f, pool_bytes=5 << 20), "its digest differs"),
        "schema": (lambda f: edit(f, True, schema=2), "not schema 1"),
        "target": (lambda f: edit(f, True, target="metal"), "target 'metal'"),
        "path": (lambda f: edit(f, True, base="../x.so"), "object '../x.so'"),
        "file": (lambda f: edit(f, True, candidates=[{**candidate, "file": "/bin/sh"}]), "object '/bin/sh'"),
        "field": (lambda f: edit(f, True, extra=1), "not a tuning plan"),
        "batch": (lambda f: edit(f, True, batches=[0]), "batches is 0"),
        "work": (lambda f: edit(f, True, work=[]), "it holds no work"),
        "json": (lambda f: (f / "plan.json").write_text("{"), "not a tuning plan"),
        "gone": (lambda f: (f / "plan.json").unlink(), "cannot read"),
        "short": (lambda f: (f / "c000.so").write_bytes(b"x"), "is not the file the plan names"),
        "lost": (lambda f: (f / "c001.json").unlink(), "is missing or is not the file"),
    }
    for name, (change, reason) in cases.items():
        with pytest.raises(RecordError, match=reason) as caught:
            read_bundle(damaged(name, change))
        assert str(caught.value).count("\n") == 0, name


def test_build_refuses_folders_and_options(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("...")
    with pytest.raises(RecordError, match="is not a bundle"):
        build_bundle(SHAPES, tmp_path / "mine", OPTIONS)
    with pytest.raises(LiftcError, match="a sweep is for one architecture"):
        build_bundle(SHAPES, tmp_path / "b", replace(OPTIONS, target="cuda"))
    with pytest.raises(LiftcError, match="no kernel to tune"):
        build_bundle(SHAPES, tmp_path / "b", replace(OPTIONS, ops=("conv",)))
    assert not (tmp_path / "b").exists() and (tmp_path / "mine" / "thesis.txt").exists()


def test_shapes_are_read_from_names_text_and_files(tmp_path: Path) -> None:
    assert [(w.out_features, w.in_features) for w in find_work("Llama-2-70B", ())] == [
        s[1:] for s in MODELS["llama-2-70b"]
    ]
    assert find_work("8x16, 4 x 2", ("77/32", "64/32"))[2] == Work("LQ-64/32", 8, 16)
    (tmp_path / "a.json").write_text("[[8, 16], [4, 2]]")
    (tmp_path / "b.txt").write_text("# out in\n8 16\n4x2  # tiny\n")
    assert find_work(str(tmp_path / "a.json"), ()) == find_work(str(tmp_path / "b.txt"), ())
    (tmp_path / "c.json").write_text("[8, 16]")
    for source, reason in (("llama-3-7000b", "neither a file nor a name"), ("8x0", "cannot read the shape"),
                           (str(tmp_path / "c.json"), "not a JSON list")):  # fmt: skip
        with pytest.raises(LiftcError, match=reason):
            find_work(source, ())


def test_bench_measures_checks_and_writes(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = bundle / f"llvm-{LEVEL}.so"
    plot = ["--plot", str(tmp_path / "roof.svg")] if has_matplotlib() else []
    arguments = ["bench", "kernels", str(kernels), "--shapes", SHAPES, "--format", "24/10", "--batch", "2", "--prefill",
                 "300", "--pool", "32K", "--threads", "1", "--json", str(tmp_path / "rows.json"), "--records",
                 str(tmp_path / "records"), "-q", *plot]  # fmt: skip
    assert cli.main(arguments) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    (file,) = (tmp_path / "records").glob("*.jsonl")
    assert [r.to_json() for r in read_records(file)] == rows
    names = [r["kernel"] for r in rows]
    assert names.count("sign_matmul") == 3 and names.count("lifted_linear") == 3
    assert {"lift", "lift+sign_matmul", "torch.unpack+matmul", "torch.linear.float32"} <= set(names)
    assert all(r["status"] == "ok" and r["microseconds"] > 0 for r in rows)
    text = capsys.readouterr().out
    assert "| 48x40 | LQ-24/10 | 2 |" in text and "read ceiling" in text
    assert not plot or b"<svg" in (tmp_path / "roof.svg").read_bytes()[:600]


def test_formats_of_a_shape_set_and_kinds_of_rows(bundle: Path, tmp_path: Path) -> None:
    options = BenchOptions(
        shapes=("48x40,33x20@24/10,24/8",), only=("prefill", "decode", "peers"), batches=(1,), prefill=300,
        pool_bytes=32768, threads=1, formats=("77/32",), progress=False,
    )  # fmt: skip
    answer = bench_kernels(bundle / f"llvm-{LEVEL}.so", options)
    rows = [(r["kernel"], r["format"], r.get("chain", "")) for r in answer["records"]]
    layer = "48x40+33x20*1"
    for fmt in ("LQ-24/10", "LQ-24/8"):
        assert rows.count(("lifted_linear", fmt, "")) == 2 and ("lifted_linear", fmt, layer) in rows
        assert ("torch.linear.float32", fmt, layer) in rows
    peers = [row for row in rows if row[0] == "torch.unpack+matmul"]
    assert len(peers) == 2 and all(fmt == "LQ-24/10" for _, fmt, _ in peers)
    assert "the speed of dense" in answer["text"] and not any(
        r["kernel"] == "unpack_tiles" for r in answer["records"]
    )


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_bench_refuses_a_wrong_kernel(bundle: Path, tmp_path: Path) -> None:
    made = bad_bundle(bundle, tmp_path / "bad", ("silent",))
    loaded = tmp_path / "bad" / made.candidates[0].file
    descriptor = json.loads(loaded.with_suffix(".json").read_text())
    assert descriptor["functions"][0]["symbol"] == "silent"
    with pytest.raises(LiftcError, match="neither a kernel object"):
        bench_kernels(tmp_path, BenchOptions(progress=False))


def test_what_the_assembler_prints_becomes_resources() -> None:
    output = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'b_kernel' for 'sm_90a'
ptxas info    : Function properties for b_kernel
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 124 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'a_kernel' for 'sm_80'
ptxas info    : Function properties for a_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 400 bytes cmem[0]
"""
    a, b = assembler_resources(output)
    assert (a.symbol, a.arch, a.registers, a.spill_bytes, a.static_shared) == ("a", "sm_80", 32, 0, 0)
    assert (b.symbol, b.arch, b.registers, b.spill_bytes, b.static_shared) == ("b", "sm_90a", 124, 16, 1024)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["tune"], "name a model"),
        (["tune", "8x8", "--build-only"], "name the bundle to write"),
        (["tune", "--merge", "a.jsonl"], "the file to write with -o"),
        (["tune", "--run", "missing"], "cannot read missing/plan.json"),
        (["tune", "8x8", "--run", "missing"], "takes a bundle and builds nothing"),
        (["tune", "--serve"], "name the tracker"),
        (["tune", "--run", "missing", "--tracker", "here"], "write it as HOST:PORT"),
        (["bench", "kernels", "missing.so"], "missing.so is missing"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, "-q"]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "option", [["--budget", "soon"], ["--batch", "0"], ["--pool", "0"], ["--shared-memory", "x"]]
)
def test_bad_numbers_end_the_parser(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", "8x8", *option])
    assert caught.value.code == 2 and "expected" in capsys.readouterr().err


def test_a_sweep_on_a_machine_of_a_tracker(bundle: Path, tmp_path: Path) -> None:
    """TVM's RPC finds the machine and carries the files; the records are those of a local run."""
    for package in ("tornado", "cloudpickle", "psutil"):
        pytest.importorskip(package, reason="the RPC tracker needs it")
    from tvm.rpc.tracker import Tracker

    from liftc.driver.tune_rpc import run_on_tracker

    tracker = Tracker("127.0.0.1", 19190, 19290, silent=True)
    command = [
        sys.executable,
        "-m",
        "liftc",
        "tune",
        "--serve",
        "--tracker",
        f"127.0.0.1:{tracker.port}",
        "--key",
        "k",
    ]
    environment = {**os.environ, "LIFTC_RECORDS": str(tmp_path / "remote"), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        answer = run_on_tracker(
            bundle, f"127.0.0.1:{tracker.port}", "k", replace(OPTIONS, records=tmp_path / "here")
        )
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:  # TVM's server may wait for its own children on a busy machine
            os.killpg(server.pid, signal.SIGKILL)
        tracker.terminate()
    (here,), (there,) = (tmp_path / "here").glob("*.jsonl"), (tmp_path / "remote").glob("*.jsonl")
    assert read_records(here) == read_records(there) and answer["measured"] == 4
