"""Checkpoints: lazy reading, exact round trips, and everything a damaged folder may hold."""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from liftc.checkpoint import (
    CastCheckpoint,
    OverlayCheckpoint,
    SafetensorsCheckpoint,
    StateDictCheckpoint,
    open_checkpoint,
)
from liftc.errors import CheckpointError
from liftc.safetensors_file import read_header, spec_of, write_safetensors
from liftc.spec import DTYPES, TensorSpec


def sample(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(3, 5, generator=generator).bfloat16(),
        "b.bias": torch.randn(7, generator=generator),
        "c.empty": torch.zeros(0, 4, dtype=torch.float16),
        "d.scalar": torch.tensor(3, dtype=torch.int64),
        "e.packed": torch.randint(-(2**31), 2**31 - 1, (2, 3), generator=generator, dtype=torch.int32),
    }


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_single_file_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = sample()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == sorted(tensors)
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        assert checkpoint.spec(name) == spec_of(name, tensor)
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert "a.weight" in checkpoint and "nothing" not in checkpoint
    assert "has no tensor nothing" in refusal(lambda: checkpoint.tensor("nothing"))


def test_result_is_owned_and_writable(tmp_path: Path) -> None:
    save_file(sample(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.tensor("b.bias").zero_()
    assert torch.equal(checkpoint.tensor("b.bias"), sample()["b.bias"])


def shard(folder: Path) -> dict[str, torch.Tensor]:
    tensors = sample()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, members in files.items() for name in members},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_shards_behave_like_one_file(tmp_path: Path) -> None:
    tensors = shard(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == sorted(tensors)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())


def test_missing_and_lying_shards(tmp_path: Path) -> None:
    shard(tmp_path)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index_path.write_text(json.dumps(index))
    assert "lacks tensor ghost" in refusal(lambda: open_checkpoint(tmp_path))
    index["weight_map"]["ghost"] = "../model.safetensors"
    index_path.write_text(json.dumps(index))
    assert "not a file name of this folder" in refusal(lambda: open_checkpoint(tmp_path))
    index["weight_map"]["ghost"] = "model-00003-of-00002.safetensors"
    index_path.write_text(json.dumps(index))
    assert "model-00003-of-00002.safetensors is missing" in refusal(lambda: open_checkpoint(tmp_path))
    index_path.write_text("{")
    assert "not readable JSON" in refusal(lambda: open_checkpoint(tmp_path))
    index_path.write_text("{}")
    assert "no weight_map" in refusal(lambda: open_checkpoint(tmp_path))


def test_folders_without_usable_weights(tmp_path: Path) -> None:
    assert "no such model folder" in refusal(lambda: open_checkpoint(tmp_path / "nowhere"))
    assert "has no weights" in refusal(lambda: open_checkpoint(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "give the file itself" in refusal(lambda: open_checkpoint(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled weights only (pytorch_model.bin), which liftc never opens" in refusal(
        lambda: open_checkpoint(tmp_path)
    )


@pytest.mark.parametrize("keep", [0, 4, 8, 30, -1, -40])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(sample(), path)
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(lambda: open_checkpoint(tmp_path))
    assert "model.safetensors" in message and "download it again" in message


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"\xff\xfe{}",
        [],
        {"x": 3},
        {"x": entry(dtype="F33")},
        {"x": entry(dtype=None)},
        {"x": entry(shape=[-2])},
        {"x": entry(shape=[2.0])},
        {"x": entry(shape=[True])},
        {"x": entry(shape="2")},
        {"x": entry(offsets=[0])},
        {"x": entry(offsets=[8, 0])},
        {"x": entry(offsets=[0, 4])},
        {"x": entry(shape=[10**30])},
        {"x": entry(offsets=[4, 12])},
        {"x": entry(), "y": entry()},
        {"x": entry(), "y": entry(offsets=[4, 12])},
        {"x": entry(), "y": entry(offsets=[8, 16])},
        {},
    ],
)
def test_malformed_headers(tmp_path: Path, header: object) -> None:
    write_raw(tmp_path / "model.safetensors", header, b"\0" * 8)
    assert "model.safetensors" in refusal(lambda: open_checkpoint(tmp_path))


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63])
def test_absurd_header_length(tmp_path: Path, length: int) -> None:
    write_raw(tmp_path / "model.safetensors", {"x": entry()}, b"\0" * 8, length)
    assert "bad header length" in refusal(lambda: open_checkpoint(tmp_path))


def test_dtypes_beyond_liftc_are_listed_but_not_read(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"x": entry("F8_E4M3", [8], [0, 8])}, b"\0" * 8)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == ["x"]
    assert "stored as F8_E4M3, which liftc does not read" in refusal(lambda: checkpoint.spec("x"))


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    save_file(sample(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-60])
    assert "has changed on disk" in refusal(lambda: [checkpoint.tensor(name) for name in checkpoint.names()])
    (tmp_path / "model.safetensors").unlink()
    assert "cannot read tensor" in refusal(lambda: checkpoint.tensor("b.bias"))


SPECS = st.dictionaries(
    st.from_regex(r"[a-z]{1,6}(\.[a-z0-9]{1,4}){0,2}", fullmatch=True),
    st.builds(
        TensorSpec, st.lists(st.integers(0, 4), max_size=3).map(tuple), st.sampled_from(sorted(DTYPES))
    ),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(specs=SPECS, seed=st.integers(0, 2**16))
def test_writer_round_trip_is_readable_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TensorSpec], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(0, 2, spec.shape, generator=generator).to(DTYPES[spec.dtype])
        for name, spec in specs.items()
    }
    path = tmp_path_factory.mktemp("round") / "model.safetensors"
    write_safetensors(path, specs, tensors.items(), {"format": "pt"})
    loaded, checkpoint = load_file(path), SafetensorsCheckpoint(path.parent)
    assert list(checkpoint.names()) == sorted(specs) == sorted(loaded)
    for name, tensor in tensors.items():
        assert checkpoint.spec(name) == specs[name]
        assert torch.equal(loaded[name], tensor) and torch.equal(checkpoint.tensor(name), tensor)


def test_writer_takes_strided_tensors_and_checks_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    matrix = torch.arange(12.0).reshape(3, 4).t()
    plan = {"m": TensorSpec((4, 3), "f32")}
    write_safetensors(path, plan, [("m", matrix)])
    assert torch.equal(load_file(path)["m"], matrix)
    assert list(read_header(path)) == ["m"]
    assert "does not match the planned layout" in refusal(
        lambda: write_safetensors(path, plan, [("n", matrix)])
    )
    assert "does not match" in refusal(lambda: write_safetensors(path, plan, [("m", matrix.t())]))
    assert "does not match" in refusal(lambda: write_safetensors(path, plan, [("m", matrix)] * 2))
    assert "no data for tensor m" in refusal(lambda: write_safetensors(path, plan, []))


def test_writer_reports_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", refuse)
    plan = {"m": TensorSpec((2,), "f32")}
    message = refusal(lambda: write_safetensors(tmp_path / "x", plan, [("m", torch.zeros(2))]))
    assert "No space left on device" in message


def test_state_dict_overlay_and_cast(tmp_path: Path) -> None:
    module = torch.nn.BatchNorm1d(3)
    base = StateDictCheckpoint(module)
    assert base.tensor("weight").data_ptr() == module.weight.data_ptr()
    assert base.spec("num_batches_tracked") == TensorSpec((), "i64")
    overlay = OverlayCheckpoint(base, {"extra": torch.ones(2)}, {"head": "weight"})
    assert list(overlay.names()) == sorted([*base.names(), "extra"])
    assert overlay.tensor("head").data_ptr() == module.weight.data_ptr()
    assert overlay.spec("extra") == TensorSpec((2,), "f32") and overlay.nbytes == base.nbytes + 8
    cast = CastCheckpoint(overlay, {"weight": "bf16"})
    assert cast.spec("weight") == TensorSpec((3,), "bf16") and cast.spec("bias").dtype == "f32"
    assert cast.tensor("weight").dtype == torch.bfloat16 and cast.tensor("head").dtype == torch.float32
    assert "no tensor ghost" in refusal(lambda: cast.tensor("ghost"))
    odd = StateDictCheckpoint({"x": torch.zeros(2, dtype=torch.complex64)})
    assert "dtype torch.complex64" in refusal(lambda: odd.spec("x"))
