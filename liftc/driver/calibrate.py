"""Calibration inputs of a captured model: token windows for language models, the example inputs otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from liftc.errors import QuantizeError
from liftc.program import Program, split_type
from liftc.quant.calibration import cut_windows, read_text, spread_windows
from liftc.runtime.tokenizer import Tokenizer
from liftc.spec import DTYPES

TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


@dataclass(frozen=True)
class CalibrationInputs:
    """What BlockRunner needs: the graph's name, inputs per sequence, inputs shared by all, and a factory of
    the caches the graph overwrites. digest: sha256 of the inputs."""

    graph: str
    sequences: list[dict[str, Any]]
    shared: dict[str, Any]
    scratch: Callable[[str], torch.Tensor]
    digest: str
    description: str


def language_model_inputs(
    program: Program, folder: Path, text: Path | None, windows: int, length: int, seed: int
) -> CalibrationInputs:
    """Windows of `length` tokens through the prefill graph; raises QuantizeError for too little text."""
    if windows < 1 or length < 2:
        raise QuantizeError(f"calibration needs at least 1 window of 2 tokens, got {windows} of {length}")
    tokens = Tokenizer(folder).encode(read_text(text), special_tokens=False)
    chosen = spread_windows(tokens, length, windows, seed)
    types = {n.name: str(n.meta["type"]) for n in program.graphs["prefill"].find_nodes(op="placeholder")}

    def scratch(name: str) -> torch.Tensor:
        dtype, dims = split_type(types[name])
        return torch.zeros([int(d) if d.isdigit() else length for d in dims], dtype=DTYPES[dtype])

    shared = {"cache_position": torch.arange(length), "logit_positions": torch.tensor([length - 1])}
    return CalibrationInputs(
        "prefill", [{"input_ids": ids} for ids in chosen], shared, scratch, digest(chosen),
        f"{len(chosen)} windows of {length} tokens of {text.name if text else 'the bundled web text'}",
    )  # fmt: skip


def encoder_inputs(
    program: Program, folder: Path, text: Path | None, windows: int, length: int
) -> CalibrationInputs:
    """Windows of text between the encoder's own begin and end tokens, through the forward graph."""
    names = [n.name for n in program.graphs["forward"].find_nodes(op="placeholder")]
    unknown = [name for name in names if name not in TEXT_INPUTS]
    if unknown:
        raise QuantizeError(
            f"this model takes the input {unknown[0]}, which text cannot fill; pass example_inputs"
        )
    tokenizer = Tokenizer(folder)
    frame = tokenizer.encode("")
    inner = length - len(frame)
    if inner < 1:
        raise QuantizeError(f"calibration windows of {length} tokens leave no room for text")
    cut = cut_windows(tokenizer.encode(read_text(text), special_tokens=False), inner, windows)
    half = (len(frame) + 1) // 2
    begin, end = torch.tensor([frame[:half]]), torch.tensor([frame[half:]])
    ids = [torch.cat([begin.long(), window, end.long()], 1) for window in cut]
    fill = {"attention_mask": torch.ones(1, length, dtype=torch.int64),
            "token_type_ids": torch.zeros(1, length, dtype=torch.int64)}  # fmt: skip
    sequences = [{"input_ids": one, **{k: v for k, v in fill.items() if k in names}} for one in ids]
    return CalibrationInputs(
        "forward", sequences, {}, _no_scratch, digest(ids),
        f"{len(ids)} windows of {length} tokens of {text.name if text else 'the bundled web text'}",
    )  # fmt: skip


def example_module_inputs(program: Program, example_inputs: Sequence[torch.Tensor]) -> CalibrationInputs:
    """The example inputs of a plain module as its only calibration sequence."""
    names = [n.name for n in program.graphs["forward"].find_nodes(op="placeholder")]
    if len(names) != len(example_inputs):
        raise QuantizeError(
            f"the captured graph takes {len(names)} inputs, example_inputs holds {len(example_inputs)}"
        )
    sequence = dict(zip(names, example_inputs))
    return CalibrationInputs(
        "forward", [sequence], {}, _no_scratch, digest(list(example_inputs)), "the example inputs"
    )


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """sha256 over dtype, shape and bytes of tensors, in order."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _no_scratch(name: str) -> torch.Tensor:
    raise QuantizeError(f"the graph reads the input {name}, which calibration does not provide")
