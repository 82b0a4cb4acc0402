"""End-to-end tuning: train scales and vectors of the whole quantized model against the original's outputs.

A language model is tuned by the KL divergence of its next-token distribution from the original's, any other
module by the relative squared error of its outputs. Unlike quantization this holds the weights of all blocks
at once, in the model's dtype; activations are recomputed block by block when gradients are taken.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from liftc.errors import QuantizeError
from liftc.quant.blocks import BlockRunner, Weights
from liftc.quant.calibration import split_held_out
from liftc.quant.correct import fit
from liftc.quant.result import FACTS, Quantized, TuneReport, write_atomically
from liftc.quant.stream import StreamQuantizer
from liftc.quant.trainable import Trainable
from liftc.tensor_names import output_scale_name, packed_name

TUNED_FILE = "tuned.safetensors"
CHECKPOINT_ABOVE = 1 << 30
"""Weights above which activations are recomputed instead of kept."""


def tune(
    stream: StreamQuantizer, quantized: Quantized, *, language_model: bool, shared: Mapping[str, Any]
) -> None:
    """Tune what `stream` quantized and append the file of tuned tensors to `quantized`; loads it when a run
    before has left it. shared: placeholder values that make the graph give all its outputs."""
    path, ranks = quantized.folder / TUNED_FILE, stream.ranks
    absent = not path.exists()
    ranks.barrier()
    if absent:
        started = time.perf_counter()
        trainable = whole_model(stream, quantized)
        student, teacher = stream.new_runner(stream.stores()), stream.new_runner(stream.stores())
        _to_last_segment(teacher, stream.checkpoint.tensor)
        for runner in (student, teacher):
            runner.share(shared)
        loss = _loss(student, teacher, trainable, stream.checkpoint.tensor, language_model=language_model)
        options = stream.options
        train, held_out = split_held_out(range(len(student)), options.held_out, options.seed)
        fitted = fit(
            trainable, loss, train, held_out, epochs=options.tune_epochs, rates=options.rates, dense=False,
            seed=options.seed, ranks=ranks,
        )  # fmt: skip
        for runner in (student, teacher):
            runner.close()
        scales = trainable.scales()
        tensors = {
            output_scale_name(n): scales[linear.weight] for n, linear in stream.program.linears.items()
        }
        report = TuneReport(fitted.before, fitted.after, fitted.epochs)
        quantized.seconds[path.stem] = time.perf_counter() - started
        if ranks.first:
            write_atomically(path, {**tensors, **trainable.vectors()}, {"tuned": asdict(report)})
        ranks.barrier()
    try:
        with safe_open(path, "pt") as handle:
            quantized.tuned = TuneReport(**json.loads(handle.metadata()[FACTS])["tuned"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise QuantizeError(f"{path} is damaged ({error}); delete it and run again") from error
    quantized.files.append(path)


def whole_model(stream: StreamQuantizer, quantized: Quantized) -> Trainable:
    """Every weight on the device: linears as unit and scale, vectors as the blocks left them."""
    trainable = Trainable(stream.device)
    where = quantized.tensors()

    def stored(name: str) -> torch.Tensor:
        with safe_open(where[name], "pt") as handle:
            return handle.get_tensor(name)  # type: ignore[no-any-return]

    for name, linear in stream.program.linears.items():
        unit = stream.unit_weight(linear, stored(packed_name(name)))
        trainable.quantized(
            linear.weight, unit, stored(output_scale_name(name)), transposed=linear.transposed
        )
    weights = {linear.weight for linear in stream.program.linears.values()}
    for node in stream.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name in weights or name in trainable:
            continue
        value = stored(name) if name in where else stream.checkpoint.tensor(name)
        if name in stream.vectors:
            trainable.add_vector(name, value)
        else:
            trainable.fixed[name] = value.to(stream.device)
    return trainable


def _to_last_segment(runner: BlockRunner, fetch: Callable[[str], torch.Tensor]) -> None:
    for index in range(len(runner.segments) - 1):
        runner.advance(index, fetch)


def run_whole(
    runner: BlockRunner, number: int, weights: Weights, *, recompute: bool = False
) -> dict[Node, Any]:
    """Outputs of the whole graph for one batch; with recompute, blocks keep no activations for the gradient."""
    values: dict[Node, Any] = {}
    last = len(runner.segments) - 1
    for index in range(last + 1):
        if recompute and index < last:
            found = checkpoint(runner.outputs, index, number, weights, values, use_reentrant=False)
        else:
            found = runner.outputs(index, number, weights, values)
        values = {n: v for n, v in {**values, **found}.items() if runner.graph.last_use.get(n, -1) > index}
    return {node: values[node] for node in runner.graph.results if node in values}


def _loss(
    student: BlockRunner,
    teacher: BlockRunner,
    trainable: Trainable,
    fetch: Callable[[str], torch.Tensor],
    *,
    language_model: bool,
) -> Callable[[int], torch.Tensor]:
    last = len(teacher.segments) - 1
    originals = teacher.weights(last, fetch)
    large = sum(w.numel() for w in trainable.fixed.values()) + trainable.weight_count > CHECKPOINT_ABOVE

    def loss(number: int) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher.outputs(last, number, originals)
        recompute = large and torch.is_grad_enabled()
        total = energy = torch.zeros((), device=student.device)
        for node, value in run_whole(student, number, trainable.weights(), recompute=recompute).items():
            target = wanted[node]
            if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                continue
            if language_model:
                return kl_divergence(target, value)
            total = total + (value.float() - target.float()).square().sum()
            energy = energy + target.float().square().sum()
        return total / energy.clamp_min(1e-30)

    return loss


def kl_divergence(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(softmax(target) || softmax(logits)) in nats; both (..., vocabulary)."""
    p = torch.log_softmax(target.float(), -1)
    return (p.exp() * (p - torch.log_softmax(logits.float(), -1))).sum(-1).mean()
