"""The tensors of an artifact, one at a time: quantized parts, shared transforms, and what stays as it was."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors import safe_open

from liftc.checkpoint import Checkpoint
from liftc.errors import ArtifactError
from liftc.packing import concatenate_packed
from liftc.program import Program
from liftc.quant.mapping import load_mapping
from liftc.quant.result import Quantized
from liftc.spec import DTYPES
from liftc.tensor_names import output_scale_name, packed_name, packed_parts, transform_names


def artifact_tensors(
    program: Program, quantized: Quantized, checkpoint: Checkpoint
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor the lowered program declares, name and value, in Program.tensors order.

    Raises ArtifactError when a value disagrees with its declaration.
    """
    where = quantized.tensors()
    parts = {name.rpartition(".")[0]: members for name, members in packed_parts(program).items()}
    shared: dict[str, torch.Tensor] = {}
    for lift, shape in program.lifts.items():
        names = transform_names(lift, shape)
        white = quantized.whitenings[shape.left, shape.right]
        shared[names.left], shared[names.right] = white.left, white.right_inverse
        shared[names.mapping] = load_mapping(shape.format)

    def stored(name: str) -> torch.Tensor:
        with safe_open(where[name], "pt") as handle:
            return handle.get_tensor(name)  # type: ignore[no-any-return]

    for name, spec in program.tensors.items():
        owner = name.rpartition(".")[0]
        if name in shared:
            value = shared[name]
        elif owner in parts and name == packed_name(owner):
            rows = [program.linears[member].out_features for member in parts[owner]]
            value = concatenate_packed([stored(packed_name(member)) for member in parts[owner]], rows)
        elif owner in parts and name == output_scale_name(owner):
            value = torch.cat([stored(output_scale_name(member)) for member in parts[owner]])
        elif name in where:
            value = stored(name)
        else:
            value = checkpoint.tensor(name)
        if tuple(value.shape) != spec.shape:
            raise ArtifactError(f"tensor {name} has shape {tuple(value.shape)}, the program declares {spec}")
        yield name, value.to(DTYPES[spec.dtype]).contiguous()
