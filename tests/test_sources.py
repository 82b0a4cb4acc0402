"""Calibration documents from text, JSONL, Parquet and Arrow: what is read, in which order, what is refused."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftc.errors import QuantizeError
from liftc.quant import sources
from liftc.quant.sources import Document, documents, row_document
from liftc.quant.sources_folder import data_files

ROWS = [{"text": f"document {i} ä"} for i in range(5)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(path: Path | None, **options: Any) -> list[str]:
    return [document.text for document in documents(path, **options)]


def test_bundled_text_is_one_running_document() -> None:
    (document,) = documents(None)
    assert len(document.text) > 500_000 and not document.whole


def test_text_file_is_one_running_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "first\n\nsecond ü".encode())
    (document,) = documents(path)
    assert document.text == "first\n\nsecond ü" and not document.whole


def test_rows_of_jsonl(tmp_path: Path) -> None:
    rows = [*ROWS, {"text": ""}, {"text": None}, {"text": "  "}, {"text": "last", "id": 3}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text() + "\n\n" + '{"text": "no newline"}')
    found = list(documents(path))
    assert [d.text for d in found] == [r["text"] for r in ROWS] + ["last", "no newline"]
    assert all(d.whole for d in found)


def test_fields(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "plain", "messages": CHAT, "body": "other"}])
    assert texts(path) == ["plain"] and texts(path, field="body") == ["other"]
    (chat,) = documents(path, chat=True)
    assert chat.messages == tuple(CHAT) and chat.text == ""
    (chat,) = documents(path, "messages")
    assert chat.messages == tuple(CHAT)


def test_halves_of_surrogate_pairs_are_replaced() -> None:
    assert row_document({"text": "a\ud800b"}, ("text",), "").text == "a\ufffdb"
    assert row_document({"text": "a\U0001f600b"}, ("text",), "").text == "a\U0001f600b"


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), max_size=30),
    piece=st.integers(1, 200),
)
def test_every_row_is_read_once_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], piece: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows), "utf-8", newline=""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", piece)
        assert sorted(texts(path)) == sorted(row for row in rows if row.strip())


@settings(max_examples=30, deadline=None)
@given(text=st.text("aä漢😀\n ", min_size=1, max_size=300), piece=st.integers(5, 60))
def test_pieces_of_text_are_parts_of_it(
    tmp_path_factory: pytest.TempPathFactory, text: str, piece: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_text(text, "utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", piece)
        patch.setattr(sources, "WHOLE_TEXT", 0)
        found = texts(path, seed=1)
    assert all(part in text for part in found)
    if "\n" not in text:
        assert sum(map(len, found)) >= len(text.replace(" ", "")) - 2 * len(text.encode()) // piece - 2


def test_order_is_seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 64)
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(100)])
    first, again, other = texts(path, seed=1), texts(path, seed=1), texts(path, seed=2)
    assert first == again != other and sorted(first) == sorted(other)


def test_big_files_are_sampled_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a few documents of a 40 MB file neither loads it nor starts at its head only."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"{i} " + "word " * 400} for i in range(20_000)])
    assert path.stat().st_size > 40e6
    stream = documents(path, seed=3)
    tracemalloc.start()
    found = [int(next(stream).text.split()[0]) for _ in range(400)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
    assert min(found) < 5000 and max(found) > 15_000
    monkeypatch.setattr(sources, "MOST_PIECES", 4)
    assert len({int(t.split()[0]) // 5000 for t in texts(path)}) == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "line 3 is not JSON"),
        (b"[" * 100_000, "line 3 is not JSON"),
        (b'"just text"', "line 3 holds text, not an object"),
        (b'{"body": "a", "id": 1}', "line 3 has no field 'text' or 'messages', only body, id"),
        (b"{}", "only nothing"),
        (b'{"text": 3}', "line 3: field 'text' holds a number"),
        (b'{"messages": [{"role": "user"}]}', "neither text nor a list of messages"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "neither text nor"),
        (b'{"text": "\xff"}', "is not UTF-8 text (byte"),
    ],
)
def test_refused_lines(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(QuantizeError) as stop:
        list(documents(path))
    message = str(stop.value)
    assert said in message and str(path) in message and "\n" not in message
    assert message.count(str(path)) == 1


def test_refused_long_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 1 << 20)
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a" * (1 << 20)}])
    with pytest.raises(QuantizeError, match="a line of more than 1 MiB"):
        list(documents(path))


def test_refused_files(tmp_path: Path) -> None:
    for name, data, said in (
        ("a.txt", b"good \xff\xfe", "not UTF-8 text .byte 5."),
        ("a.json", b"{}", "none of the kinds liftc reads"),
        ("a.jsonl.gz", b"", "none of the kinds liftc reads"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(QuantizeError, match=said):
            list(documents(tmp_path / name))
    with pytest.raises(QuantizeError, match="no such file or folder"):
        list(documents(tmp_path / "none"))
    with pytest.raises(QuantizeError, match="drop --calibration-field"):
        list(documents(tmp_path / "a.txt", "body"))


def test_folder_of_texts_and_held_out_splits(tmp_path: Path) -> None:
    for name in ("b.txt", "sub/a.txt", ".git/c.txt", "test.txt", "data/validation-0.txt", "latest.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    found = list(documents(tmp_path))
    assert {d.text for d in found} == {"text of b.txt", "text of sub/a.txt", "text of latest.txt"}
    assert all(d.whole for d in found)
    write_lines(tmp_path / "rows.jsonl", ROWS)
    assert sorted(texts(tmp_path)) == [row["text"] for row in ROWS]
    only = tmp_path / "only"
    write_lines(only / "test-00000.jsonl", ROWS)
    with pytest.raises(QuantizeError, match="only files of test and validation splits"):
        list(documents(only))
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(QuantizeError, match="both tables and JSONL"):
        list(documents(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(QuantizeError, match=r"holds no \.parquet"):
        list(documents(tmp_path / "empty"))


def test_tables_need_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(QuantizeError, match=r"pip install 'liftc\[datasets\]'"):
        list(documents(tmp_path / "a.parquet"))


def table(rows: Sequence[dict[str, Any]]) -> Any:
    return pytest.importorskip("pyarrow").Table.from_pylist(list(rows))


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], group: int = 1000) -> Path:
    made = table(rows)
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(made, path, row_group_size=group)
    return path


def write_arrow(path: Path, rows: Sequence[dict[str, Any]], batch: int = 1000, *, file: bool = False) -> Path:
    made = table(rows)
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    with (pa.ipc.new_file if file else pa.ipc.new_stream)(str(path), made.schema) as writer:
        writer.write_table(made, max_chunksize=batch)
    return path


def test_parquet(tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"row {i}", "messages": CHAT} for i in range(50)]
    path = write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows, group=7)
    assert sorted(texts(path)) == sorted(r["text"] for r in rows) == sorted(texts(tmp_path, seed=5))
    assert texts(path, seed=1) != texts(path, seed=2)
    assert all(d.messages == tuple(CHAT) for d in documents(path, chat=True))
    with pytest.raises(QuantizeError, match="no column 'body', only id, text, messages"):
        list(documents(path, "body"))
    with pytest.raises(QuantizeError, match="field 'id' holds a number"):
        list(documents(path, "id"))


@pytest.mark.parametrize("file", [False, True])
def test_arrow(tmp_path: Path, file: bool) -> None:
    rows = [{"text": f"row {i}"} for i in range(600)]
    path = write_arrow(tmp_path / "a.arrow", rows, batch=300, file=file)
    assert sorted(texts(path)) == sorted(r["text"] for r in rows)
    assert texts(path, seed=0)[:300] in ([r["text"] for r in rows[:300]], [r["text"] for r in rows[300:]])


def saved_dataset(folder: Path, rows: Sequence[dict[str, Any]], shards: int = 2) -> Path:
    """The layout `Dataset.save_to_disk` writes."""
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        write_arrow(folder / name, rows[i::shards])
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_saved_dataset(tmp_path: Path) -> None:
    folder = saved_dataset(tmp_path / "plain", ROWS)
    write_arrow(folder / "cache-123.arrow", [{"text": "left over from map()"}])
    assert sorted(texts(folder)) == [row["text"] for row in ROWS]
    both = tmp_path / "dict"
    saved_dataset(both / "train", ROWS)
    saved_dataset(both / "test", [{"text": "held out"}])
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert sorted(texts(both)) == [row["text"] for row in ROWS]
    (both / "dataset_dict.json").write_text('{"splits": ["test", "other"]}')
    with pytest.raises(QuantizeError, match="the splits test, other but no split called train"):
        list(documents(both))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ('{"_data_files": [{"filename": "../../secret.arrow"}]}', "does not list the shards"),
        ('{"_data_files": [3]}', "does not list the shards"),
        ("[]", "does not list the shards"),
        ("{", "cannot be read as JSON"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "lacks its shard gone.arrow"),
    ],
)
def test_refused_state(tmp_path: Path, state: str, said: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(QuantizeError, match=said):
        data_files(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("damage", ["empty", "noise", "truncated"])
def test_damaged_tables(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    (write_parquet if suffix == ".parquet" else write_arrow)(path, [{"text": "row " * 100}] * 300)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "noise": b"\x07" * 500, "truncated": data[: len(data) // 2]}[damage])
    with pytest.raises(QuantizeError, match=str(path)) as stop:
        list(documents(path))
    assert "\n" not in str(stop.value)


def test_arrow_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", [{"text": "MARKER"}])
    path.write_bytes(path.read_bytes().replace(b"MARKER", b"\xff\xfeRKER"))
    with pytest.raises(QuantizeError, match="UTF"):
        list(documents(path))


def test_document_defaults() -> None:
    assert Document("a").whole and Document("a").messages == ()
