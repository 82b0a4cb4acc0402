"""What matters to the model's result: Kronecker factors of its Fisher information, measured block by block.

The second-order effect of an error E of a weight on the KL divergence of the model's output is about
tr(G E H Eᵀ) with H = E[w x xᵀ] over the inputs x of the linear and G = E[g gᵀ] over the gradients g of its
outputs, w = |g|² per token. Gradients are of -log p(y) for tokens y drawn from the model's own prediction, whose
outer product is the Fisher information; of a random projection of the outputs for modules that are no language
models. `measure` runs the original model forwards, keeps what enters every block, and goes back block by block,
so that one block's weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.fx import Node
from tqdm import tqdm

from liftc.errors import QuantizeError
from liftc.quant.activations import ActivationStore
from liftc.quant.blocks import BlockRunner
from liftc.quant.parallel import Ranks
from liftc.quant.result import write_atomically

if TYPE_CHECKING:
    from liftc.quant.stream import StreamQuantizer

EXPONENT = 0.5
"""Power of the token weights: one drawn token per position makes them noisy (docs/method.md)."""
OUTPUT_ROWS = 4096
"""Most rows of a group whose output factor G is kept: it has rows² entries."""


@dataclass(frozen=True)
class SegmentFisher:
    """Factors of one segment. Token weights are float32 over all tokens of all batches in order, of mean 1.

    tokens: weights by lift. block: weights of the segment's output. outputs: G by lift, float32 (OC, OC) of the
    stacked rows of its group, mean diagonal 1. counts: tokens of every batch.
    """

    tokens: Mapping[str, torch.Tensor]
    block: torch.Tensor
    outputs: Mapping[str, torch.Tensor]
    counts: tuple[int, ...]

    def of_batch(self, number: int) -> torch.Tensor:
        """Weights of the segment's output for the tokens of one batch."""
        start = sum(self.counts[:number])
        return self.block[start : start + self.counts[number]]


class Fisher:
    """Factors of all segments, one file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, index: int) -> Path:
        """The file of a segment."""
        return self.folder / f"segment-{index:05d}.safetensors"

    def segment(self, index: int, device: torch.device) -> SegmentFisher:
        """Factors of a segment on the device. Raises QuantizeError for a damaged file."""
        try:
            found = load_file(self.path(index))
            counts = tuple(int(n) for n in found.pop("counts"))
            block = found.pop("block").to(device)
        except (OSError, SafetensorError, KeyError) as error:
            raise QuantizeError(
                f"{self.path(index)} is damaged ({error}); delete it and run again"
            ) from error
        split: dict[str, dict[str, torch.Tensor]] = {"tokens": {}, "outputs": {}}
        for name, value in found.items():
            kind, _, lift = name.partition(".")
            split.setdefault(kind, {})[lift] = value.to(device)
        return SegmentFisher(split["tokens"], block, split["outputs"], counts)


def measure(
    stream: StreamQuantizer, *, language_model: bool, shared: Mapping[str, Any], progress: bool = False
) -> Fisher:
    """Measure what `stream` needs of the original model, one file per segment; files of a run before are kept.

    shared: placeholder values that make the graph give all its outputs. Raises QuantizeError when a gradient is
    not finite.
    """
    ranks = stream.ranks
    fisher = Fisher(stream.result.folder.parent / "fisher" / f"{ranks.rank}-of-{ranks.size}")
    fisher.folder.mkdir(parents=True, exist_ok=True)
    runner, again = stream.new_runner(stream.stores()), stream.new_runner(stream.stores())
    groups = [stream.groups(segment) for segment in runner.segments]
    wanted = [i for i, lifts in enumerate(groups) if lifts]
    if all(fisher.path(i).exists() for i in wanted):
        return fisher
    for one in (runner, again):
        one.share(shared)
    last = len(runner.segments) - 1
    with tqdm(total=2 * last + 1 - wanted[0], desc="fisher", unit="block", disable=not progress) as bar:
        entered = [runner.keep(stream.stores())]
        for index in range(last):
            runner.advance(index, stream.original)
            entered.append(runner.keep(stream.stores()))
            bar.update()
        runner.close()
        backward = _Backward(stream, again, language_model=language_model)
        for index in range(last, wanted[0] - 1, -1):
            tensors = backward.step(index, entered.pop(), groups[index])
            if groups[index]:
                write_atomically(fisher.path(index), tensors, {})
            bar.update()
        backward.close()
        for kept in entered:
            kept.close()
    return fisher


class _Backward:
    """Gradients of all batches on their way back through the segments."""

    def __init__(self, stream: StreamQuantizer, runner: BlockRunner, *, language_model: bool) -> None:
        self.stream, self.runner, self.language_model = stream, runner, language_model
        self.gradients: ActivationStore = stream.stores()
        for number in range(len(runner)):
            self.gradients.put(number, {})
        seed = stream.options.seed * 1_000_003 + stream.ranks.rank
        self.generator = torch.Generator(stream.device).manual_seed(seed)
        floats = [n for n in runner.graph.results if n in runner.graph.per_sequence]
        self.results = floats[:1] if language_model else floats

    def close(self) -> None:
        """Drop what is kept."""
        self.gradients.clear()
        self.runner.close()

    def step(self, index: int, entered: Any, groups: Mapping[str, list[str]]) -> dict[str, torch.Tensor]:
        """Go back through one segment; the tensors of its file. entered: of BlockRunner.keep."""
        stream, device = self.stream, self.stream.device
        weights = self.runner.weights(index, stream.checkpoint.tensor)
        nodes = {lift: [stream.nodes[name] for name in names] for lift, names in groups.items()}
        tokens: dict[str, list[torch.Tensor]] = {lift: [] for lift in groups}
        block: list[torch.Tensor] = []
        outputs: dict[str, torch.Tensor] = {}
        for number in range(len(self.runner)):
            found, leaving = self._batch(index, number, entered.get(number), weights, nodes)
            for lift, gradient in found.items():
                tokens[lift].append(gradient.square().sum(-1))
                rows = gradient.shape[-1]
                if rows <= OUTPUT_ROWS:
                    outputs.setdefault(lift, torch.zeros(rows, rows, device=device)).addmm_(
                        gradient.T, gradient
                    )
            block.append(leaving)
        entered.close()
        if not groups:
            return {}
        counts = torch.tensor([len(part) for part in block])
        result = {f"tokens.{lift}": _weights(parts, stream.ranks) for lift, parts in tokens.items()}
        for lift, total in outputs.items():
            mean = stream.ranks.sum(total).diagonal().mean().clamp_min(1e-30)
            result[f"outputs.{lift}"] = (total / mean).cpu()
        return {**result, "block": _weights(block, stream.ranks), "counts": counts}

    def _batch(
        self, index: int, number: int, alive: dict[Node, Any], weights: Any, nodes: Mapping[str, list[Node]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Gradients float32 (tokens, OC) of the stacked outputs of every lift's linears, and the squared norms of
        the gradient of the segment's output."""
        graph = self.runner.graph
        read = {o for node in self.runner.segments[index].nodes for o in node.all_input_nodes}
        leaves = {
            n: v.detach().requires_grad_() for n, v in alive.items()
            if n in read and n in graph.per_sequence and isinstance(v, torch.Tensor) and v.is_floating_point()
        }  # fmt: skip
        watched: dict[Node, torch.Tensor] = {}

        def watch(node: Node, y: torch.Tensor) -> torch.Tensor:
            watched[node] = y if y.requires_grad else y.detach().requires_grad_()
            watched[node].retain_grad()
            return watched[node]

        with torch.enable_grad():
            out = self.runner.outputs(
                index, number, weights, {**alive, **leaves},
                watch={node: watch for linears in nodes.values() for node in linears},
            )  # fmt: skip
        held = {
            self.runner.node(name): g for name, g in self.gradients.get(number, self.stream.device).items()
        }
        for node in self.results:
            if node in out and out[node].is_floating_point():
                held[node] = held.get(node, 0) + self._first(out[node])
        ends = [n for n, v in out.items() if n in held and isinstance(v, torch.Tensor) and v.requires_grad]
        torch.autograd.backward([out[n] for n in ends], [held[n].to(out[n].dtype) for n in ends])
        leaving = sum(held[n].float().square().sum(-1).flatten() for n in ends) if ends else torch.zeros(0)
        for node, leaf in leaves.items():
            if leaf.grad is not None:
                held[node] = held[node] + leaf.grad if node in held else leaf.grad
        produced = set(self.runner.segments[index].nodes)
        self.gradients.put(number, {n.name: g for n, g in held.items() if n not in produced})
        found: dict[str, torch.Tensor] = {}
        for lift, linears in nodes.items():
            parts = [_gradient(watched[node]) for node in linears]
            found[lift] = torch.cat(parts, -1)
            if not torch.isfinite(found[lift]).all():
                raise QuantizeError(
                    f"{lift}: the model's gradients are not finite; use --dtype float32 or --no-fisher"
                )
        return found, torch.as_tensor(leaving)

    def _first(self, value: torch.Tensor) -> torch.Tensor:
        """Gradient of a result: softmax(z) - onehot(y) with y drawn from softmax(z), or a random projection."""
        if not self.language_model:
            return torch.randn(value.shape, generator=self.generator, device=value.device)
        p = torch.softmax(value.detach().float(), -1)
        if not torch.isfinite(p).all():
            raise QuantizeError("the model's logits are not finite; use --dtype float32 or check its weights")
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=self.generator).view(*p.shape[:-1], 1)
        return p.scatter_add_(-1, drawn, torch.full_like(drawn, -1, dtype=p.dtype))


def _gradient(y: torch.Tensor) -> torch.Tensor:
    gradient = y.grad if y.grad is not None else torch.zeros_like(y)
    return gradient.detach().float().flatten(0, -2)


def _weights(parts: list[torch.Tensor], ranks: Ranks) -> torch.Tensor:
    """Squared gradients of all tokens to weights of mean 1 over all processes, on the CPU."""
    weights = torch.cat(parts).float()
    for power in (1.0, EXPONENT):
        weights = weights.pow(power)
        mean = ranks.mean(weights.mean().item(), weights.device) if len(weights) else 1.0
        weights = weights / mean if mean > 0 else torch.ones_like(weights)
    return weights.cpu()
