"""Quantize a whole program, one decoder block in memory at a time, resumable at every block.

For each block: (1) run it with its original weights on what the quantized prefix really produces and sum the
input gram of every shared lift; (2) whiten, encode and pack its linears with block LDLQ; (3) run it again
with the decoded weights to get the next block's inputs. A finished block is one safetensors file in the work
folder, written under a temporary name and renamed, so an interrupted run continues at the first missing one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.fx import Graph, Node
from tqdm import tqdm

from liftc import reference
from liftc.checkpoint import Checkpoint
from liftc.errors import LiftcError, QuantizeError
from liftc.packing import slice_packed
from liftc.program import Program
from liftc.quant.blocks import BlockRunner, Segment
from liftc.quant.encode import MAX_BEAM
from liftc.quant.ldlq import quantize_group
from liftc.quant.mapping import lam_of, load_mapping
from liftc.quant.whitening import Whitening, orthogonal_whitening
from liftc.spec import LiftSpec, LinearSpec
from liftc.tensor_names import output_scale_name, packed_name

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantizeOptions:
    """beam: beam width of the encoder. damp: share of the gram's mean diagonal added to it. seed: of the
    whitening. device: where the linears are encoded, a GPU when there is one. The weight lam of the tree search
    is the one each mapping matrix was learned with."""

    beam: int = 64
    damp: float = 0.01
    seed: int = 0
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")

    def __post_init__(self) -> None:
        if not 1 <= self.beam <= MAX_BEAM or not self.damp > 0:
            raise QuantizeError(
                f"--beam must lie between 1 and {MAX_BEAM} and --damp above 0, got {self.beam} and {self.damp:g}"
            )


@dataclass(frozen=True)
class LinearReport:
    """Errors of one linear: relative weight error and proxy loss of its group (see GroupResult)."""

    name: str
    format: str
    relative_error: float
    proxy_loss: float


@dataclass
class Quantized:
    """What quantization produced: files by block, the shared transforms, and the per-linear report."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    whitenings: dict[tuple[int, int], Whitening] = field(default_factory=dict)
    report: list[LinearReport] = field(default_factory=list)

    def tensors(self) -> dict[str, Path]:
        """Name of every quantized tensor -> the file that holds it."""
        found: dict[str, Path] = {}
        for path in self.files:
            with safe_open(path, "pt") as handle:
                found.update(dict.fromkeys(handle.keys(), path))
        return found


def linear_nodes(graph: Graph, program: Program) -> dict[str, Node]:
    """The aten.linear node of every selected linear, by linear name."""
    by_weight = {spec.weight: name for name, spec in program.linears.items()}
    found: dict[str, Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        weight = node.args[1]
        if isinstance(weight, Node) and weight.target is aten.t.default:
            weight = weight.args[0]
        if isinstance(weight, Node) and weight.op == "get_attr" and str(weight.target) in by_weight:
            found[by_weight[str(weight.target)]] = node
    return found


class StreamQuantizer:
    """Drives BlockRunner over one graph of a program that has passed share-transforms."""

    def __init__(
        self,
        program: Program,
        graph_name: str,
        checkpoint: Checkpoint,
        runner: BlockRunner,
        options: QuantizeOptions,
        folder: Path,
    ) -> None:
        self.program, self.checkpoint, self.runner, self.options = program, checkpoint, runner, options
        self.nodes = linear_nodes(program.graphs[graph_name], program)
        missing = sorted(set(program.linears) - set(self.nodes))
        if missing:
            raise QuantizeError(f"graph {graph_name} does not hold the selected linear {missing[0]}")
        self.result = Quantized(folder)
        self._dense: dict[str, torch.Tensor] = {}

    def run(self, *, progress: bool) -> Quantized:
        """Quantize every segment; finished segments found in the folder are loaded instead."""
        self.result.folder.mkdir(parents=True, exist_ok=True)
        work = [(i, s, self._groups(s)) for i, s in enumerate(self.runner.segments)]
        last = max((i for i, _, groups in work if groups), default=-1)
        total = sum(1 for _, _, groups in work if groups)
        with tqdm(total=total, desc="quantize", unit="block", disable=not progress) as bar:
            for index, _, groups in work[: last + 1]:
                if groups:
                    self._segment(index, groups)
                    latest = [r.proxy_loss for r in self.result.report[-len(groups) :]]
                    bar.set_postfix(proxy_loss=f"{sum(latest) / len(latest):.4f}")
                    bar.update()
                if index < last:
                    self.runner.advance(index, self._fetch)
                self._dense.clear()
        return self.result

    def _groups(self, segment: Segment) -> dict[str, list[str]]:
        members = set(segment.nodes)
        groups: dict[str, list[str]] = {}
        for name, node in self.nodes.items():
            if node in members:
                groups.setdefault(self.program.linears[name].lift, []).append(name)
        return groups

    def _segment(self, index: int, groups: Mapping[str, list[str]]) -> None:
        path = self.result.folder / f"block-{index:05d}.safetensors"
        if not path.exists():
            grams = self._collect(index, groups)
            tensors: dict[str, torch.Tensor] = {}
            reports: list[LinearReport] = []
            for lift_name, names in groups.items():
                tensors.update(self._quantize(lift_name, names, grams[lift_name], reports))
            write_atomically(path, tensors, {"report": json.dumps([asdict(r) for r in reports])})
        self._load(path, groups)

    def _collect(self, index: int, groups: Mapping[str, list[str]]) -> dict[str, torch.Tensor]:
        grams: dict[str, torch.Tensor] = {}
        rows: dict[str, int] = {}
        hooks: dict[Node, Callable[[torch.Tensor], None]] = {}
        for lift_name, names in groups.items():
            source = self.nodes[names[0]].args[0]
            assert isinstance(source, Node)
            width = self.program.lifts[lift_name].in_features
            grams[lift_name], rows[lift_name] = torch.zeros(width, width), 0

            def hook(x: torch.Tensor, key: str = lift_name) -> None:
                flat = x.reshape(-1, x.shape[-1]).float()
                grams[key].addmm_(flat.T, flat)
                rows[key] += flat.shape[0]

            hooks[source] = _both(hooks[source], hook) if source in hooks else hook
        self.runner.observe(index, self._fetch, hooks)
        return {key: gram / max(1, rows[key]) for key, gram in grams.items()}

    def _quantize(
        self, lift_name: str, names: list[str], gram: torch.Tensor, reports: list[LinearReport]
    ) -> dict[str, torch.Tensor]:
        spec = self.program.lifts[lift_name]
        linears = [self.program.linears[name] for name in names]
        weights = [self._original(linear) for linear in linears]
        tensors: dict[str, torch.Tensor] = {}
        try:
            result = quantize_group(
                torch.cat(weights), gram, spec, self.whitening(spec), load_mapping(spec.format),
                beam=self.options.beam, damp=self.options.damp, lam=lam_of(spec.format),
                device=torch.device(self.options.device),
            )  # fmt: skip
        except LiftcError as error:
            raise QuantizeError(f"{lift_name}: {error}") from error
        for name, rows in row_slices(linears).items():
            tensors[packed_name(name)] = slice_packed(result.packed, rows.start, rows.stop)
            tensors[output_scale_name(name)] = result.output_scale[rows].clone()
            reports.append(LinearReport(name, str(spec.format), result.relative_error, result.proxy_loss))
        return tensors

    def whitening(self, spec: LiftSpec) -> Whitening:
        """The data-free transform shared by all lifts of the same factor sizes."""
        key = (spec.left, spec.right)
        if key not in self.result.whitenings:
            self.result.whitenings[key] = orthogonal_whitening(*key, self.options.seed)
        return self.result.whitenings[key]

    def _load(self, path: Path, groups: Mapping[str, list[str]]) -> None:
        try:
            with safe_open(path, "pt") as handle:
                reports = [LinearReport(**row) for row in json.loads(handle.metadata()["report"])]
                for lift_name, names in groups.items():
                    spec = self.program.lifts[lift_name]
                    white = self.whitening(spec)
                    right = reference.decode_right(white.right_inverse, load_mapping(spec.format))
                    for name in names:
                        packed = handle.get_tensor(packed_name(name))
                        scale = handle.get_tensor(output_scale_name(name))
                        dense = reference.decode_weight(
                            packed, scale, None, white.left, right, spec.in_features
                        )
                        linear = self.program.linears[name]
                        self._dense[linear.weight] = dense.T.contiguous() if linear.transposed else dense
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise QuantizeError(f"{path} is damaged ({error}); delete it and run again") from error
        self.result.files.append(path)
        self.result.report.extend(reports)

    def _original(self, linear: LinearSpec) -> torch.Tensor:
        weight = self.checkpoint.tensor(linear.weight)
        weight = weight.T if linear.transposed else weight
        if not torch.isfinite(weight).all():
            raise QuantizeError(f"weight {linear.weight} holds NaN or infinite values; repair the checkpoint")
        return weight.float()

    def _fetch(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.tensor(name)
        return self._dense[name].to(tensor.dtype) if name in self._dense else tensor


def row_slices(linears: list[LinearSpec]) -> dict[str, slice]:
    """Rows of each linear in the stacked weight of its group."""
    slices: dict[str, slice] = {}
    start = 0
    for linear in linears:
        slices[linear.name] = slice(start, start + linear.out_features)
        start += linear.out_features
    return slices


def write_atomically(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it to disk and rename it."""
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise QuantizeError(f"cannot write {path}: {error}; free some disk space and run again") from error


def _both(first: Callable[[Any], None], second: Callable[[Any], None]) -> Callable[[Any], None]:
    def call(value: Any) -> None:
        first(value)
        second(value)

    return call
