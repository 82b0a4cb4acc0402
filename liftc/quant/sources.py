"""Documents of a calibration set on disk: a text file, a JSONL file, or a folder of a data set.

Nothing is read that is not asked for: big files are cut into pieces, the pieces are visited in a seeded order,
and the caller stops when it has enough. Files are hostile: every one is checked as it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import torch

from liftc.errors import QuantizeError
from liftc.quant.sources_folder import data_files

DEFAULT_TEXT = "calibration.txt"
WHOLE_TEXT = 4 << 20
"""Bytes up to which a text file is read as a whole, as one document."""
PIECE = 64 << 10
"""Bytes of a piece of a bigger text file, and of a JSONL file."""
MOST_PIECES = 16 << 10
"""Pieces of one file; of a file above 1 GiB they are samples, evenly spaced."""
LONGEST_LINE = 64 << 20
FILES_AT_ONCE = 16
UNREADABLE = {".json", ".csv", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".pkl", ".pickle", ".pt", ".bin"}
TABLES = {".parquet", ".arrow"}
LINES = {".jsonl", ".ndjson"}

Message = Mapping[str, str]
Piece = Callable[[], Iterator["Document"]]


@dataclass(frozen=True)
class Document:
    """One text, or one conversation of {"role", "content"} messages. whole: it is a complete document, not
    running text or a part of it. where: its place, for error messages."""

    text: str = ""
    messages: tuple[Message, ...] = ()
    whole: bool = True
    where: str = ""


def documents(
    path: Path | None, field: str | None = None, *, chat: bool = False, seed: int = 0
) -> Iterator[Document]:
    """The documents of `path` that are not empty; the bundled text (liftc/data/SOURCES.md) when None.

    field: name of the field of JSONL and table rows (None: "text", then "messages"; the other way round with
    `chat`). seed: order in which the pieces of big sets are visited; small files are read from front to back.
    Raises QuantizeError for paths that do not exist, files that are damaged or of unknown kind, and rows without
    the field.
    """  # fmt: skip
    if path is None:
        yield Document(bundled_text(), whole=False, where="the bundled text")
        return
    kind, files = (_kind(path), [path]) if path.is_file() else data_files(path)
    if kind == "text" and field:
        raise QuantizeError(f"{path} is plain text, which has no field {field!r}; drop --calibration-field")
    wanted = (field,) if field else ("messages", "text") if chat else ("text", "messages")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(files), generator=generator).tolist() if len(files) > 1 else [0]
    for start in range(0, len(order), FILES_AT_ONCE):
        pieces: list[Piece] = []
        for index in order[start : start + FILES_AT_ONCE]:
            pieces += _pieces(files[index], kind, wanted, alone=path.is_file())
        for number in torch.randperm(len(pieces), generator=generator).tolist():
            for document in pieces[number]():
                if document.text.strip() or document.messages:
                    yield document


def bundled_text() -> str:
    """The calibration text that comes with liftc."""
    return (resources.files("liftc.data") / DEFAULT_TEXT).read_text(encoding="utf-8")


def row_document(row: object, fields: tuple[str, ...], where: str) -> Document:
    """Document of one row, a mapping: the first of `fields` it has. Null and empty values give empty documents.

    Raises QuantizeError when the row is no mapping, has none of the fields, or holds something else in it.
    """
    if not isinstance(row, Mapping):
        raise QuantizeError(f"{where} holds {_kind_of(row)}, not an object with a field {fields[0]!r}")
    name = next((field for field in fields if field in row), None)
    if name is None:
        raise QuantizeError(
            f"{where} has no field {' or '.join(map(repr, fields))}, only {', '.join(map(str, row)) or 'nothing'}; "
            "name the one to read with --calibration-field"
        )
    value = row[name]
    if value is None or isinstance(value, str):
        return Document(text=_scalar_values(value or ""), where=where)
    if not isinstance(value, list) or not all(_is_message(entry) for entry in value):
        raise QuantizeError(
            f"{where}: field {name!r} holds {_kind_of(value)}, neither text nor a list of messages with text in "
            '"role" and "content"'
        )
    return Document(
        messages=tuple({k: _scalar_values(m[k]) for k in ("role", "content")} for m in value), where=where
    )


def _pieces(path: Path, kind: str, fields: tuple[str, ...], *, alone: bool) -> list[Piece]:
    if kind == "table":
        from liftc.quant.sources_table import table_pieces

        return [
            lambda rows=rows: (row_document(row, fields, where) for where, row in rows())  # type: ignore[misc]
            for rows in table_pieces(path, fields)
        ]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise QuantizeError(f"cannot read {path}: {error.strerror or error}") from error
    if kind == "text" and size <= WHOLE_TEXT:
        return [
            lambda: iter([Document(_decode(_read(path, 0, size), path, 0), whole=not alone, where=str(path))])
        ]
    cut = _text_piece if kind == "text" else _line_piece
    step = max(PIECE, -(-size // MOST_PIECES))
    return [
        lambda start=start: cut(path, start, min(start + PIECE, size), size, fields)  # type: ignore[misc]
        for start in range(0, size, step)
    ]


def _text_piece(path: Path, start: int, stop: int, size: int, fields: tuple[str, ...]) -> Iterator[Document]:
    """Text between two offsets, without the lines cut at its ends (or, in one long line, the characters)."""
    data = _read(path, start, stop)
    if start:
        while data and data[0] & 0xC0 == 0x80 and len(data) > stop - start - 3:
            data = data[1:]
    if stop < size:
        for back in range(1, min(4, len(data)) + 1):
            if data[-back] & 0xC0 != 0x80:
                data = data[:-back] if data[-back] >= 0xC0 else data
                break
    text = _decode(data, path, start)
    first, last = text.find("\n") + 1 if start else 0, text.rfind("\n") + 1 if stop < size else len(text)
    yield Document(text[first:last] if first < last else text, whole=False, where=f"{path}, byte {start}")


def _line_piece(path: Path, start: int, stop: int, size: int, fields: tuple[str, ...]) -> Iterator[Document]:
    """Rows of a JSONL file whose line begins between two offsets."""
    with _open(path) as handle:
        handle.seek(max(0, start - 1))
        if start:
            _line(handle, path)
        offset = handle.tell()
        while offset < stop and (line := _line(handle, path)):
            if line.strip():
                yield _json_row(line, path, offset, fields)
            offset += len(line)


def _json_row(line: bytes, path: Path, offset: int, fields: tuple[str, ...]) -> Document:
    where = f"{path}, byte {offset}"
    try:
        text = _decode(line, path, offset)
        row = json.loads(text)
        return row_document(row, fields, where)
    except QuantizeError as error:
        raise QuantizeError(str(error).replace(where, f"{path}, line {_line_number(path, offset)}")) from None
    except (ValueError, RecursionError) as error:
        said = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        )
        raise QuantizeError(f"{path}, line {_line_number(path, offset)} is not JSON: {said}") from error


def _line(handle: BinaryIO, path: Path) -> bytes:
    line = handle.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise QuantizeError(
            f"{path} has a line of more than {LONGEST_LINE >> 20} MiB; split it into documents"
        )
    return line


def _line_number(path: Path, offset: int) -> int:
    number, left = 1, offset
    with _open(path) as handle:
        while left > 0 and (block := handle.read(min(left, 1 << 20))):
            number, left = number + block.count(b"\n"), left - len(block)
    return number


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise QuantizeError(f"cannot read {path}: {error.strerror or error}") from error


def _read(path: Path, start: int, stop: int) -> bytes:
    with _open(path) as handle:
        handle.seek(start)
        return handle.read(stop - start)


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff" if offset == 0 else "")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise QuantizeError(
            f"{path} is not UTF-8 text (byte {at}); convert it, for example with iconv"
        ) from error


def _scalar_values(text: str) -> str:
    """JSON can spell halves of surrogate pairs, which no tokenizer takes: they become U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in UNREADABLE:
        raise QuantizeError(
            f"{path} is none of the kinds liftc reads: UTF-8 text, .jsonl (one object a line), .parquet, .arrow, "
            "or a folder of them"
        )
    return "table" if suffix in TABLES else "lines" if suffix in LINES else "text"


def _is_message(entry: Any) -> bool:
    return isinstance(entry, Mapping) and all(isinstance(entry.get(k), str) for k in ("role", "content"))


def _kind_of(value: object) -> str:
    names = {
        str: "text",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        bool: "true or false",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
