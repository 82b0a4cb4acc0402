"""Calibration inputs of a captured model: token windows for language models, the example inputs otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from liftc.errors import LiftcError, QuantizeError
from liftc.program import Program, split_type
from liftc.quant.calibration import CalibrationRequest, collect_tokens, spread_windows
from liftc.quant.sources import Document, documents
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


def language_model_inputs(program: Program, folder: Path, request: CalibrationRequest) -> CalibrationInputs:
    """Token windows through the prefill graph; raises QuantizeError for sets that cannot be read or hold too
    little text, LiftcError for a model without the chat template asked for."""
    length = request.length
    tokenizer = Tokenizer(folder)
    chosen = _windows(tokenizer, request, length, tokenizer.document_marks())
    longest = program.attrs.get("max_position_embeddings")
    if isinstance(longest, int) and 0 < longest < length:
        raise QuantizeError(
            f"--calibration-length {length} is longer than the {longest} tokens this model can read"
        )
    return prefill_inputs(program, chosen, request.describe(len(chosen)))


def prefill_inputs(
    program: Program, windows: Sequence[torch.Tensor], description: str, *, all_logits: bool = False
) -> CalibrationInputs:
    """Windows of token ids (1, length), all of one length, through the prefill graph.

    all_logits: ask for the logits of every position instead of the last one.
    """
    length = windows[0].shape[1]
    types = {n.name: str(n.meta["type"]) for n in program.graphs["prefill"].find_nodes(op="placeholder")}

    def scratch(name: str) -> torch.Tensor:
        dtype, dims = split_type(types[name])
        return torch.zeros([int(d) if d.isdigit() else length for d in dims], dtype=DTYPES[dtype])

    positions = torch.arange(length)
    shared = {"cache_position": positions, "logit_positions": positions if all_logits else positions[-1:]}
    return CalibrationInputs(
        "prefill", [{"input_ids": ids} for ids in windows], shared, scratch, digest(windows), description
    )


def encoder_inputs(program: Program, folder: Path, request: CalibrationRequest) -> CalibrationInputs:
    """Windows of text between the encoder's own begin and end tokens, through the forward graph."""
    names = [n.name for n in program.graphs["forward"].find_nodes(op="placeholder")]
    unknown = [name for name in names if name not in TEXT_INPUTS]
    if unknown:
        raise QuantizeError(
            f"this model takes the input {unknown[0]}, which text cannot fill; pass example_inputs"
        )
    tokenizer = Tokenizer(folder)
    before, after = tokenizer.frame()
    length = request.length
    inner = length - len(before) - len(after)
    if inner < 1:
        raise QuantizeError(f"calibration windows of {length} tokens leave no room for text")
    begin, end = torch.tensor([before]).long(), torch.tensor([after]).long()
    ids = [torch.cat([begin, window, end], 1) for window in _windows(tokenizer, request, inner, ([], []))]
    fill = {"attention_mask": torch.ones(1, length, dtype=torch.int64),
            "token_type_ids": torch.zeros(1, length, dtype=torch.int64)}  # fmt: skip
    sequences = [{"input_ids": one, **{k: v for k, v in fill.items() if k in names}} for one in ids]
    return CalibrationInputs(
        "forward", sequences, {}, _no_scratch, digest(ids), request.describe(len(ids))
    )  # fmt: skip


def _windows(
    tokenizer: Tokenizer, request: CalibrationRequest, length: int, marks: tuple[list[int], list[int]]
) -> list[torch.Tensor]:
    """Windows of `length` tokens drawn from the documents asked for; `marks` go around whole documents."""
    if request.chat_template and tokenizer.chat_template is None:
        raise QuantizeError("this model has no chat template; drop --chat-template")

    def encode(document: Document) -> list[int]:
        messages = document.messages
        if messages and not request.chat_template:
            raise QuantizeError(
                f"{document.where} holds messages; render them with --chat-template, or name a field of plain "
                "text with --calibration-field"
            )
        if request.chat_wrap and not messages:
            messages = ({"role": "user", "content": document.text},)
        if messages:
            try:
                text = tokenizer.render(messages, add_generation_prompt=False)
            except LiftcError as error:
                raise QuantizeError(f"{document.where}: {error}") from error
            return tokenizer.encode(text, special_tokens=False)
        before, after = marks if document.whole else ([], [])
        return [*before, *tokenizer.encode(document.text, special_tokens=False), *after]

    found = documents(request.path, request.field, chat=request.chat_template, seed=request.seed)
    try:
        return spread_windows(
            collect_tokens(found, encode, request.wanted), length, request.windows, request.seed
        )
    except QuantizeError as error:
        said = str(error)
        raise QuantizeError(
            said if request.path is None or str(request.path) in said else f"{request.path}: {said}"
        ) from error


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
