"""The rooms are installed as liftc.*, completely, nowhere else, and import each other only as allowed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # standard library from Python 3.11

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ROOMS = ("passes", "codegen", "runtime")
SEES_ALL = {"liftc/cli.py", "liftc/cli_kernels.py", "liftc/__init__.py", "liftc/__main__.py"}


def test_every_package_is_listed() -> None:
    found = {
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
        for name, folder in SETUPTOOLS["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")  # does not follow links
    }
    assert found == set(SETUPTOOLS["packages"])


@pytest.mark.parametrize("name", ROOMS)
def test_no_generic_top_level_name(name: str, tmp_path: Path) -> None:
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({name!r}) is not None)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=tmp_path).returncode == 0


def sources(folder: str) -> list[Path]:
    return [p for p in (ROOT / folder).rglob("*.py") if not any(part.is_symlink() for part in p.parents)]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("room", ["liftc", *ROOMS])
def test_import_direction(room: str) -> None:
    """Core imports no room, rooms import core and not each other; only driver and CLI see all."""
    forbidden = tuple(f"liftc.{name}" for name in (*ROOMS, "driver", "cli") if name != room)
    for path in sources(room):
        relative = path.relative_to(ROOT).as_posix()
        if relative in SEES_ALL or relative.startswith("liftc/driver/"):
            continue
        wrong = sorted(name for name in imported(path) if name.startswith(forbidden))
        assert not wrong, f"{relative} imports {wrong[0]}"


def test_runtime_needs_neither_tvm_nor_transformers() -> None:
    """What `liftc.load` imports, transitively, never names TVM, transformers or the quantizer."""
    probe = (
        "import sys\n"
        "for name in ('tvm', 'transformers', 'gguf', 'networkx'): sys.modules[name] = None\n"
        "import liftc, liftc.runtime.loader, liftc.runtime.tokenizer\n"
        "assert 'liftc.quant' not in sys.modules and 'liftc.capture' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_is_light() -> None:
    probe = "import sys, liftc; sys.exit(any(name in sys.modules for name in ('torch', 'tvm', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


def test_environment_is_read_in_one_place() -> None:
    """codegen/build_cuda.py sets a variable for TVM while it builds; nothing else touches the environment."""
    users = {
        path.relative_to(ROOT).as_posix()
        for room in ("liftc", *ROOMS)
        for path in sources(room)
        if "os.environ" in path.read_text(encoding="utf-8")
    }
    assert users == {"liftc/env.py", "codegen/build_cuda.py"}


def test_no_file_called_utils() -> None:
    assert not [p for room in ("liftc", *ROOMS, "tests") for p in sources(room) if "utils" in p.stem]
