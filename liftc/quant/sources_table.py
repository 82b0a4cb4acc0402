"""Rows of Parquet files and Arrow shards (as `datasets` saves them), read through pyarrow a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from liftc.errors import QuantizeError

Rows = Callable[[], Iterator[tuple[str, object]]]
BATCH = 256
"""Rows decoded at once."""
BUFFER = 1 << 20
"""Bytes of a Parquet column read at once: a row group can be a whole file."""


def table_pieces(path: Path, fields: tuple[str, ...]) -> list[Rows]:
    """One reader per Parquet row group or Arrow record batch; each yields (place, {field: value}).

    Only the columns among `fields` are read. Raises QuantizeError without pyarrow, for damaged files, and for
    files that have none of the columns.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise QuantizeError(
            f"reading {path} needs pyarrow: pip install 'liftc[datasets]', or give a .jsonl or text file"
        ) from error
    pieces = _parquet if path.suffix.lower() == ".parquet" else _arrow
    return pieces(path, fields)


def _parquet(path: Path, fields: tuple[str, ...]) -> list[Rows]:
    import pyarrow as pa
    from pyarrow import parquet

    def read(group: int) -> Iterator[tuple[str, object]]:
        try:
            with parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER) as file:
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
                    yield from _rows(batch, f"{path}, row group {group}")
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error

    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, fields)
            count = file.metadata.num_row_groups
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    return [lambda group=group: read(group) for group in range(count)]  # type: ignore[misc]


def _arrow(path: Path, fields: tuple[str, ...]) -> list[Rows]:
    """Batches of a memory-mapped shard: listing them touches their headers only."""
    import pyarrow as pa

    def read(batch: Any, number: int) -> Iterator[tuple[str, object]]:
        try:
            for start in range(0, batch.num_rows, BATCH):
                yield from _rows(batch.slice(start, BATCH), f"{path}, batch {number}")
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error

    try:
        source = pa.memory_map(str(path))
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            reader = pa.ipc.open_file(source)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        else:
            reader = pa.ipc.open_stream(source)
            batches = list(reader)
        columns = _columns(path, reader.schema.names, fields)
        chosen = [batch.select(columns) for batch in batches]
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    return [lambda b=b, i=i: read(b, i) for i, b in enumerate(chosen)]  # type: ignore[misc]


def _rows(batch: Any, where: str) -> Iterator[tuple[str, object]]:
    batch.validate(full=True)  # offsets and UTF-8 of a hostile file
    for row in batch.to_pylist():
        yield where, row


def _columns(path: Path, names: list[str], fields: tuple[str, ...]) -> list[str]:
    found = [name for name in fields if name in names]
    if not found:
        raise QuantizeError(
            f"{path} has no column {' or '.join(map(repr, fields))}, only {', '.join(names) or 'nothing'}; "
            "name the one to read with --calibration-field"
        )
    return found[:1]


def _damaged(path: Path, error: Exception) -> QuantizeError:
    said = str(error).strip().splitlines()
    return QuantizeError(f"{path} cannot be read: {said[0] if said else type(error).__name__}")
