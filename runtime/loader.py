"""Load an artifact folder: check it, place its tensors, register its kernels, bind its graphs."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from liftc import env, ir, reference
from liftc.artifact import read_json, read_manifest
from liftc.checkpoint import SafetensorsCheckpoint
from liftc.errors import ArtifactError, LiftcError, TargetError
from liftc.graphjson import graph_from_json
from liftc.packing import packed_rows
from liftc.runtime.fused_adds import fuse_adds
from liftc.runtime.fused_lifts import fuse
from liftc.runtime.kernels import load_kernels
from liftc.runtime.module import CausalLM, GraphModel
from liftc.runtime.ops import Ops, register
from liftc.runtime.tiles import TiledSigns

FOLDED = "graph/folded.json"
PACKED_ARGUMENT: dict[Any, int] = {ir.sign_matmul: 2, ir.lifted_linear: 5}
"""Where an op takes packed signs; their output_scale follows."""

DEVICE_OF_TARGET = {"llvm": "cpu", "cuda": "cuda"}


def load(path: str | Path, device: str | torch.device | None = None, *, check: bool = True) -> GraphModel:
    """Load an artifact as a torch module: CausalLM for language models, GraphModel otherwise.

    device: "cpu", "cuda", "cuda:1", or None for the device of the artifact's first target. check=False skips
    the sha256 of the files. Needs torch and tvm_ffi only. Raises ArtifactError for an incomplete or altered
    folder and TargetError when the artifact holds no code for the device.
    """
    folder = Path(path)
    manifest = read_manifest(folder, check=check)
    place = _device(manifest, device)
    kernels = load_kernels(_kernel_object(folder, manifest, place), place)
    names = [name for name in manifest["files"] if name.startswith("graph/") and name != FOLDED]
    graphs = {Path(name).stem: graph_from_json(read_json(folder / name)) for name in names}
    tensors = _tensors(folder, place)
    tensors.update(_folded(folder, tensors))
    ops = register(kernels)
    if place.type == "cuda" and ops.tiles.available:
        _tile_signs(graphs, tensors, ops.tiles)
        _pass_operands(graphs, tensors, ops)
    if manifest.get("kind") == "causal-lm":
        return CausalLM(graphs, tensors, read_json(folder / "config.json"), place)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return GraphModel(graphs, tensors, config, place)


def _device(manifest: dict[str, Any], device: str | torch.device | None) -> torch.device:
    targets = list(manifest.get("targets") or ())
    if not targets or any(target not in DEVICE_OF_TARGET for target in targets):
        raise ArtifactError(
            f"the manifest names the targets {targets}, this liftc knows {list(DEVICE_OF_TARGET)}"
        )
    place = torch.device(device) if device is not None else torch.device(DEVICE_OF_TARGET[targets[0]])
    devices = [DEVICE_OF_TARGET[target] for target in targets]
    if place.type not in devices:
        raise TargetError(
            f"this artifact holds code for {' and '.join(devices)}, not for {place.type}; "
            f"compile it again with the target you need"
        )
    if place.type == "cuda" and not torch.cuda.is_available():
        offer = "; load it with device='cpu' to use its CPU code" if "cpu" in devices else ""
        raise TargetError(
            f"this artifact is compiled for CUDA and this machine has no usable NVIDIA GPU{offer}"
        )
    return place


def _kernel_object(folder: Path, manifest: dict[str, Any], place: torch.device) -> Path:
    target = next(target for target, name in DEVICE_OF_TARGET.items() if name == place.type)
    for name in manifest["files"]:
        path = folder / name
        if name.startswith("kernels/") and name.endswith(".json") and read_json(path).get("target") == target:
            kernels: Path = path.with_suffix(".so")
            return kernels
    raise ArtifactError(f"{folder / 'kernels'} holds no object for target {target}")


def _tensors(folder: Path, place: torch.device) -> dict[str, torch.Tensor]:
    checkpoint = SafetensorsCheckpoint(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        tensors[name] = (
            tensor.to(place, torch.float32) if name.endswith(".output_scale") else tensor.to(place)
        )
    return tensors


def _tile_signs(graphs: dict[str, Graph], tensors: dict[str, torch.Tensor], tiles: TiledSigns) -> None:
    """Replace the packed signs that only lift ops read by their tiles, one after the other, in place."""
    scales: dict[str, str] = {}
    others: set[str] = set()
    for graph in graphs.values():
        for node in graph.nodes:
            if node.op != "get_attr":
                continue
            for user in node.users:
                place = PACKED_ARGUMENT.get(user.target)
                scale = user.args[place + 1] if place is not None and user.args[place] is node else None
                if isinstance(scale, Node) and scale.op == "get_attr" and user.args.count(node) == 1:
                    scales[str(node.target)] = str(scale.target)
                else:
                    others.add(str(node.target))
    for name, scale_name in scales.items():
        packed, rows = tensors.get(name), tensors[scale_name].shape[0] if scale_name in tensors else 0
        if packed is None or name in others or packed.dim() != 2 or not rows:
            continue
        if tiles.accepts(rows, packed.shape[1]) and packed.shape[0] == packed_rows(rows):
            tensors[name] = tiles.from_packed(packed, rows)


def _pass_operands(graphs: dict[str, Graph], tensors: dict[str, torch.Tensor], ops: Ops) -> None:
    """Let every lift whose z goes to tiled products only hand it over as operand bytes, without int16.

    Unless LIFTC_FUSED is 0, such a lift also takes the input of the norm, the gate or the GELU before it, and the
    product adds the bias and the residual behind it.
    """
    for graph in graphs.values():
        for node in graph.nodes:
            if node.target is not ir.lift or not all(u.target is operator.getitem for u in node.users):
                continue
            values = [user for user in node.users if user.args[1] == 0]
            products = [user for value in values for user in value.users]
            if products and all(_is_tiled_product(p, values, tensors) for p in products):
                node.target = ops.lift_operands
                for product in products:
                    product.target = ops.tiles.sign_matmul
        if env.fused():
            fuse_adds(graph, tensors, ops.tiles)
            fuse(graph, ops)


def _is_tiled_product(node: Node, values: list[Node], tensors: dict[str, torch.Tensor]) -> bool:
    if node.target is not ir.sign_matmul or node.args[0] not in values or node.kwargs:
        return False
    packed = node.args[2]
    named = isinstance(packed, Node) and packed.op == "get_attr" and str(packed.target) in tensors
    return named and tensors[str(packed.target)].dim() == 4 and node.args[1:].count(node.args[0]) == 0  # type: ignore[union-attr]


def _folded(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    entries = read_json(folder / FOLDED) if (folder / FOLDED).is_file() else {}
    result: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        try:
            op, operands = entry
            if op != "decode_right":
                raise ArtifactError(f"{folder / FOLDED} folds {name} with unknown op {op!r}")
            result[name] = reference.decode_right(*(tensors[operand] for operand in operands)).contiguous()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{folder / FOLDED}: entry {name} is malformed ({error})") from error
        except LiftcError as error:
            raise ArtifactError(f"{folder / FOLDED}: entry {name}: {error}") from error
    return result
