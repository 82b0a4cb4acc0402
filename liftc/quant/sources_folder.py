"""Which files of a folder are the data set: what `save_to_disk` wrote, or the layout of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from liftc.errors import QuantizeError

KINDS = {".parquet": "table", ".arrow": "table", ".jsonl": "lines", ".ndjson": "lines", ".txt": "text"}
HELD_OUT = {"test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"}


def data_files(folder: Path) -> tuple[str, list[Path]]:
    """(kind, files in a fixed order) of the data set in `folder`; kind is "table", "lines" or "text".

    A folder written by `Dataset.save_to_disk` gives its shards, one of `DatasetDict.save_to_disk` its split
    "train" or its only split. Any other folder gives all files of one kind below it, those of splits named
    test, validation and the like left out; text files count only where nothing else is.
    Raises QuantizeError when the folder does not exist, holds no data, or leaves the choice open.
    """
    if not folder.is_dir():
        raise QuantizeError(f"{folder}: no such file or folder")
    if (folder / "dataset_dict.json").is_file():
        return data_files(_split(folder))
    if (folder / "state.json").is_file():
        return "table", _shards(folder)
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in KINDS and _visible(p, folder))
    by_kind: dict[str, list[Path]] = {}
    for path in found:
        by_kind.setdefault(KINDS[path.suffix.lower()], []).append(path)
    if len(by_kind) > 1:
        by_kind.pop("text", None)
    if not by_kind:
        raise QuantizeError(f"{folder} holds no .parquet, .arrow, .jsonl or .txt file")
    if len(by_kind) > 1:
        raise QuantizeError(
            f"{folder} holds both tables and JSONL files; name one file or folder of one kind"
        )
    kind, files = by_kind.popitem()
    kept = [path for path in files if not _held_out(path.relative_to(folder))]
    if not kept:
        raise QuantizeError(
            f"{folder} holds only files of test and validation splits, such as {files[0].name}; "
            "name the file itself to calibrate on it"
        )
    return kind, kept


def _split(folder: Path) -> Path:
    splits = _json(folder / "dataset_dict.json").get("splits")
    names = (
        [s for s in splits if isinstance(s, str) and re.fullmatch(r"\w[\w.-]*", s)]
        if isinstance(splits, list)
        else []
    )
    chosen = "train" if "train" in names else names[0] if len(names) == 1 else None
    if chosen is None:
        raise QuantizeError(
            f"{folder} holds the splits {', '.join(names) or 'none'} but no split called train; name the folder of one"
        )
    return folder / chosen


def _shards(folder: Path) -> list[Path]:
    entries = _json(folder / "state.json").get("_data_files")
    names = (
        [e.get("filename") if isinstance(e, dict) else None for e in entries]
        if isinstance(entries, list)
        else []
    )
    if not names or any(not isinstance(n, str) or Path(n).name != n or n in {".", ".."} for n in names):
        raise QuantizeError(f"{folder / 'state.json'} does not list the shards of a data set; save it again")
    paths = [folder / str(name) for name in names]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise QuantizeError(f"{folder} lacks its shard {missing.name}; copy the whole folder")
    return paths


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise QuantizeError(f"{path} cannot be read as JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def _visible(path: Path, folder: Path) -> bool:
    return path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _held_out(relative: Path) -> bool:
    words = {word.lower() for part in relative.parts for word in re.split(r"[\W_\d]+", part)}
    return bool(words & HELD_OUT) and "train" not in words
