"""Quantize a whole program, one decoder block in memory at a time, resumable at every block.

For each block: (1) for each group of linears that share an input, in the order they run, sum the gram of that
input on what the quantized prefix really produces, whiten, encode and pack with block LDLQ, and, where asked,
train what is still dense against the original block's output before the next group is quantized; (2) train
scales and vectors of the finished block (correct.py); (3) run the block as it will be stored to get the next
block's inputs. A finished block is one safetensors file in the work folder, written under a temporary name
and renamed, so an interrupted run continues at the first missing one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.fx import Node
from tqdm import tqdm

from liftc import reference
from liftc.checkpoint import Checkpoint
from liftc.errors import LiftcError, QuantizeError
from liftc.packing import slice_packed
from liftc.plan import plan_program
from liftc.program import Program
from liftc.quant.activations import ActivationStore
from liftc.quant.blocks import BlockRunner
from liftc.quant.calibration import split_held_out
from liftc.quant.correct import block_loss, fit
from liftc.quant.fisher import Fisher, SegmentFisher
from liftc.quant.ldlq import quantize_group
from liftc.quant.linears import linear_nodes, row_slices
from liftc.quant.mapping import lam_of, load_mapping
from liftc.quant.parallel import Ranks
from liftc.quant.result import FACTS, BlockReport, LinearReport, Quantized, QuantizeOptions, write_atomically
from liftc.quant.segments import Segment
from liftc.quant.trainable import Trainable
from liftc.quant.whitening import Whitening, orthogonal_whitening
from liftc.spec import DTYPES, LiftSpec, LinearSpec
from liftc.tensor_names import output_scale_name, packed_name

NewRunner = Callable[[ActivationStore], BlockRunner]


class StreamQuantizer:
    """Quantizes a program that has passed share-transforms, over the graph its runners run.

    new_runner: makes a BlockRunner over the calibration set whose hidden states live in the given store.
    stores: makes those stores. device: where everything is computed.
    """

    def __init__(
        self,
        program: Program,
        graph_name: str,
        checkpoint: Checkpoint,
        new_runner: NewRunner,
        options: QuantizeOptions,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        stores: Callable[[], ActivationStore] = ActivationStore,
    ) -> None:
        self.program, self.checkpoint, self.options = program, checkpoint, options
        self.device, self.new_runner, self.stores = torch.device(device), new_runner, stores
        self.ranks = Ranks.current()
        self.graph = program.graphs[graph_name]
        self.nodes = linear_nodes(self.graph, program)
        self._weights = {spec.weight for spec in program.linears.values()}
        missing = sorted(set(program.linears) - set(self.nodes))
        if missing:
            raise QuantizeError(f"graph {graph_name} does not hold the selected linear {missing[0]}")
        self.vectors = {e.name for e in plan_program(program).entries if e.category in ("norm", "bias")}
        self.result = Quantized(folder)
        for lift in program.lifts.values():
            self.whitening(lift)
        self.fisher: Fisher | None = None
        self._ready: dict[str, torch.Tensor] = {}

    def run(self, *, progress: bool) -> Quantized:
        """Quantize every segment; finished segments found in the folder are loaded instead."""
        self.result.folder.mkdir(parents=True, exist_ok=True)
        runner = self.new_runner(self.stores())
        original = self.new_runner(self.stores()) if self.options.corrects else None
        work = [(i, self.groups(s), self._path(i)) for i, s in enumerate(runner.segments)]
        work = [item for item in work if item[1]]
        absent = {index for index, _, path in work if not path.exists()}
        missing, done = max(absent, default=-1), 0
        self.ranks.barrier()
        with tqdm(total=len(work), desc="quantize", unit="block", disable=not progress) as bar:
            for index, groups, path in work:
                if index <= missing:
                    for earlier in range(done, index):
                        self._advance(earlier, runner, original)
                    done = index
                if index in absent:
                    self._segment(index, groups, runner, original)
                self._load(path, groups, decode=index < missing)
                latest = [r.proxy_loss for r in self.result.report[-len(groups) :]]
                bar.set_postfix(proxy_loss=f"{sum(latest) / len(latest):.4f}")
                bar.update()
        for used in (runner, original):
            if used is not None:
                used.close()
        return self.result

    def original(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint. Raises QuantizeError when a weight to quantize is not finite."""
        value = self.checkpoint.tensor(name)
        if name in self._weights and not torch.isfinite(value).all():
            raise QuantizeError(f"weight {name} holds NaN or infinite values; repair the checkpoint")
        return value

    @property
    def finished(self) -> bool:
        """Whether every block has its file."""
        runner = self.new_runner(self.stores())
        found = all(self._path(i).exists() for i, s in enumerate(runner.segments) if self.groups(s))
        runner.close()
        return found

    def _advance(self, index: int, runner: BlockRunner, original: BlockRunner | None) -> None:
        runner.advance(index, self._fetch)
        if original is not None and original.position == index:
            original.advance(index, self.checkpoint.tensor)
        self._ready.clear()

    def _path(self, index: int) -> Path:
        return self.result.folder / f"block-{index:05d}.safetensors"

    def groups(self, segment: Segment) -> dict[str, list[str]]:
        """Linears of a segment by lift, in the order they run."""
        order = {node: position for position, node in enumerate(segment.nodes)}
        found = sorted((order[node], name) for name, node in self.nodes.items() if node in order)
        groups: dict[str, list[str]] = {}
        for _, name in found:
            groups.setdefault(self.program.linears[name].lift, []).append(name)
        table = list(self.program.linears)
        return {lift: sorted(names, key=table.index) for lift, names in groups.items()}

    def _segment(
        self, index: int, groups: Mapping[str, list[str]], runner: BlockRunner, original: BlockRunner | None
    ) -> None:
        started = time.perf_counter()
        fisher = self.fisher.segment(index, self.device) if self.fisher is not None else None
        trainable = self._trainable(runner, index, groups)
        if original is not None:
            original.advance(index, self.checkpoint.tensor)
        tensors: dict[str, torch.Tensor] = {}
        reports: list[LinearReport] = []
        left = list(groups)
        for lift, names in groups.items():
            weights = fisher.tokens[lift] if fisher else None
            gram = self._gram(runner, index, trainable, lift, names, weights)
            metric = fisher.outputs.get(lift) if fisher else None
            tensors.update(self._quantize(lift, names, gram, metric, trainable, reports))
            left.remove(lift)
            if left and self.options.dense_epochs:
                self._train(index, runner, original, trainable, fisher, dense=True)
        before, after = self._train(index, runner, original, trainable, fisher, dense=False)
        scales = trainable.scales()
        for names in groups.values():
            for name in names:
                tensors[output_scale_name(name)] = scales[self.program.linears[name].weight]
        tensors.update(trainable.changed_vectors())
        block = BlockReport(runner.segments[index].block, before, after)
        self.result.seconds[self._path(index).stem] = time.perf_counter() - started
        if self.ranks.first:
            facts = {"linears": [asdict(row) for row in reports], "block": asdict(block)}
            write_atomically(self._path(index), tensors, facts)
        self.ranks.barrier()

    def _trainable(self, runner: BlockRunner, index: int, groups: Mapping[str, list[str]]) -> Trainable:
        trainable = Trainable(self.device)
        ours = {self.program.linears[name].weight for names in groups.values() for name in names}
        elsewhere = {w for i, s in enumerate(runner.segments) if i != index for w in s.weights}
        for name in runner.segments[index].weights:
            value = self.original(name)
            if name in ours:
                trainable.add_dense(name, value)
            elif name in self.vectors and name not in elsewhere:
                trainable.add_vector(name, value)
            else:
                trainable.fixed[name] = value.to(self.device)
        return trainable

    def _train(
        self,
        index: int,
        runner: BlockRunner,
        original: BlockRunner | None,
        trainable: Trainable,
        fisher: SegmentFisher | None,
        *,
        dense: bool,
    ) -> tuple[float, float]:
        epochs = self.options.dense_epochs if dense else self.options.epochs
        train, held_out = split_held_out(range(len(runner)), self.options.held_out, self.options.seed)
        if original is None or not epochs or not held_out:
            return 0.0, 0.0
        loss = block_loss(runner, index, trainable, original.value, fisher.of_batch if fisher else None)
        seed = self.options.seed * 1_000_003 + index
        fitted = fit(
            trainable, loss, train, held_out, epochs=epochs, rates=self.options.rates, dense=dense, seed=seed,
            ranks=self.ranks,
        )  # fmt: skip
        return fitted.before, fitted.after

    def _gram(
        self, runner: BlockRunner, index: int, trainable: Trainable, lift: str, names: list[str],
        weights: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """E[w x xᵀ] of the input of a lift, float32 (IC, IC) on the device; w: of all tokens in order, or 1."""
        source = self.nodes[names[0]].args[0]
        assert isinstance(source, Node)
        width = self.program.lifts[lift].in_features
        gram = torch.zeros(width, width, device=self.device)
        rows = 0

        def hook(x: torch.Tensor) -> None:
            nonlocal rows
            flat = x.reshape(-1, x.shape[-1]).float()
            scaled = flat if weights is None else flat * weights[rows : rows + len(flat), None]
            gram.addmm_(flat.T, scaled)
            rows += len(flat)

        runner.observe(index, trainable.tensor, {source: hook})
        if rows == 0:
            raise QuantizeError(f"{lift}: calibration never reached the input of this layer")
        total = self.ranks.sum(torch.tensor(float(rows), dtype=torch.float64, device=self.device))
        return self.ranks.sum(gram) / total.float()

    def _quantize(
        self,
        lift: str,
        names: list[str],
        gram: torch.Tensor,
        output_metric: torch.Tensor | None,
        trainable: Trainable,
        reports: list[LinearReport],
    ) -> dict[str, torch.Tensor]:
        spec = self.program.lifts[lift]
        linears = [self.program.linears[name] for name in names]
        rows = [trainable.dense(one.weight) for one in linears]
        stacked = torch.cat([w.T if one.transposed else w for w, one in zip(rows, linears)])
        try:
            result = quantize_group(
                stacked, gram, spec, self.whitening(spec), load_mapping(spec.format),
                beam=self.options.beam, damp=self.options.damp, lam=lam_of(spec.format), device=self.device,
                ranks=self.ranks, output_metric=output_metric,
            )  # fmt: skip
        except LiftcError as error:
            raise QuantizeError(f"{lift}: {error}") from error
        tensors: dict[str, torch.Tensor] = {}
        for one, place in zip(linears, row_slices(linears).values()):
            packed = slice_packed(result.packed, place.start, place.stop)
            tensors[packed_name(one.name)] = packed
            unit = self.unit_weight(one, packed)
            trainable.quantized(one.weight, unit, result.output_scale[place], transposed=one.transposed)
            reports.append(LinearReport(one.name, str(spec.format), result.relative_error, result.proxy_loss))
        return tensors

    def whitening(self, spec: LiftSpec) -> Whitening:
        """The data-free transform shared by all lifts of the same factor sizes."""
        key = (spec.left, spec.right)
        if key not in self.result.whitenings:
            self.result.whitenings[key] = orthogonal_whitening(*key, self.options.seed)
        return self.result.whitenings[key]

    def unit_weight(self, linear: LinearSpec, packed: torch.Tensor) -> torch.Tensor:
        """The weight of a linear before its output scale, (OC, IC) in the checkpoint's dtype, on the device."""
        spec = self.program.lifts[linear.lift]
        white = self.whitening(spec).to(self.device)
        right = reference.decode_right(white.right_inverse, load_mapping(spec.format).to(self.device))
        ones = torch.ones(linear.out_features, device=self.device)
        unit = reference.decode_weight(
            packed.to(self.device), ones, None, white.left, right, spec.in_features
        )
        return unit.to(DTYPES[self.checkpoint.spec(linear.weight).dtype])

    def _load(self, path: Path, groups: Mapping[str, list[str]], *, decode: bool) -> None:
        """Take in the file of a block; with `decode`, its weights too, for the blocks that follow."""
        try:
            with safe_open(path, "pt") as handle:
                facts = json.loads(handle.metadata()[FACTS])
                reports = [LinearReport(**row) for row in facts["linears"]]
                block = BlockReport(**facts["block"])
                for name in (n for names in groups.values() for n in names if decode):
                    linear = self.program.linears[name]
                    unit = self.unit_weight(linear, handle.get_tensor(packed_name(name)))
                    scale = handle.get_tensor(output_scale_name(name)).to(self.device)
                    dense = (unit * scale[:, None].float()).to(unit.dtype)
                    self._ready[linear.weight] = dense.T.contiguous() if linear.transposed else dense
                if decode:
                    self._ready.update({n: handle.get_tensor(n) for n in self.vectors & set(handle.keys())})
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise QuantizeError(f"{path} is damaged ({error}); delete it and run again") from error
        self.result.files.append(path)
        self.result.report.extend(reports)
        self.result.blocks.append(block)

    def _fetch(self, name: str) -> torch.Tensor:
        return self._ready[name] if name in self._ready else self.checkpoint.tensor(name)
