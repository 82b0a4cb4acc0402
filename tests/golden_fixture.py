"""The `golden` fixture: compare text with a file under tests/golden; --update-golden rewrites the files."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files of tests/golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """golden(text) compares with golden/<module>/<test>.txt, golden(text, "x") with <test>.x.txt."""
    folder = GOLDEN / Path(str(request.path)).stem.removeprefix("test_")
    update = request.config.getoption("--update-golden")

    def check(text: str, part: str = "") -> None:
        name = request.node.name.removeprefix("test_").replace("[", ".").replace("]", "")
        path = folder / f"{name}{'.' if part else ''}{part}.txt"
        if update:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.is_file():
            pytest.fail(f"{path} does not exist; write it with --update-golden and read it")
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            difference = "\n".join(
                difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "now", lineterm="")
            )
            pytest.fail(
                f"{path.name} differs; if the change is right, run with --update-golden\n{difference}"
            )

    return check
