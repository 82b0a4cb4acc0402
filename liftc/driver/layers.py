"""Where quality is lost: the error of every decoder block's output against the original model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from tqdm import tqdm

from liftc.artifact import MANIFEST, read_json
from liftc.errors import ArtifactError, LiftcError
from liftc.program import copy_graph
from liftc.runtime.executor import KVCache
from liftc.runtime.module import CausalLM
from liftc.text import parse_program


@dataclass(frozen=True)
class BlockError:
    """Error of one decoder block's output y' against the original's y, each model running on its own prefix.

    relative_error: ||y' - y||^2 / ||y||^2 over all tokens; a few huge activations can dominate it. token_error:
    the same ratio per token, averaged. cosine: mean cosine of y' and y over tokens.
    """

    block: int
    relative_error: float
    token_error: float
    cosine: float


class BlockProbe:
    """Runs the prefill graph of a model up to its last decoder block; gives every block's output.

    outputs: block -> name of the graph node that holds its output, as `block_outputs` gives.
    """

    def __init__(self, model: CausalLM, outputs: dict[int, str]) -> None:
        self.model = model
        self.blocks = sorted(outputs)
        bound = model.graphs["prefill"]
        graph = copy_graph(bound.module.graph)
        nodes = {node.name: node for node in graph.nodes}
        lacking = [name for name in outputs.values() if name not in nodes]
        if lacking:
            raise ArtifactError(f"the prefill graph lacks the node {lacking[0]} that program.txt names")
        wanted = [nodes[outputs[block]] for block in self.blocks]
        _cut_after(graph, wanted)
        self.module = GraphModule(bound.module, graph)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Block outputs (1, T, hidden) of input_ids int64 (1, T), in the model's dtype and on its device."""
        place, bound = self.model.device, self.model.graphs["prefill"]
        where = torch.arange(ids.shape[1], device=place)
        cache = KVCache(bound, max(2, ids.shape[1]))
        return list(self.module(ids.to(place), where, where[-1:], *cache.tensors))


def block_outputs(graph: Graph) -> dict[int, str]:
    """Decoder block -> name of the node that holds its output: the last activation (1, t, n) of the block that a
    later block or the head reads. Raises LiftcError for a graph without blocks."""
    found: dict[int, str] = {}
    for node in graph.nodes:
        block = int(node.meta.get("block", -1))
        if block >= 0 and _is_activation(node) and any(u.meta.get("block", -1) != block for u in node.users):
            found[block] = node.name
    if not found:
        raise LiftcError("this model has no decoder blocks to compare; leave out --layers")
    return found


def outputs_of(path: Path, model: CausalLM) -> dict[int, str]:
    """block_outputs of a loaded artifact (from its program.txt) or model folder (from its captured graph)."""
    if not (path / MANIFEST).is_file():
        return block_outputs(model.graphs["prefill"].module.graph)
    try:
        program = parse_program((path / "program.txt").read_text(encoding="utf-8"))
        return block_outputs(program.graphs["prefill"])
    except (OSError, UnicodeDecodeError, KeyError) as error:
        raise ArtifactError(f"{path / 'program.txt'} cannot be read: {error}") from error


def layer_errors(
    windows: Sequence[torch.Tensor], model: BlockProbe, reference: BlockProbe, *, progress: bool = False
) -> list[BlockError]:
    """Errors of every block over windows int64 (1, T); sums are float64.

    Raises LiftcError when the two models have different blocks.
    """
    if model.blocks != reference.blocks:
        raise LiftcError(
            f"the model has {len(model.blocks)} blocks and the reference {len(reference.blocks)}; "
            "compare with the model the artifact was compiled from"
        )
    sums = torch.zeros(len(model.blocks), 4, dtype=torch.float64)  # error, energy, token ratios, cosines
    tokens = 0
    for ids in tqdm(windows, desc="layers", unit="window", disable=not progress):
        tokens += ids.shape[1]
        for row, (ours, theirs) in enumerate(zip(model(ids), reference(ids), strict=True)):
            if ours.shape != theirs.shape:
                raise LiftcError(
                    f"block {model.blocks[row]} gives {tuple(ours.shape)} in the model and {tuple(theirs.shape)} in "
                    "the reference; compare with the model the artifact was compiled from"
                )
            sums[row] += _errors(ours[0], theirs[0].to(ours.device)).cpu()
    return [
        BlockError(block, *(float(v) for v in (row[0] / row[1], row[2] / tokens, row[3] / tokens)))
        for block, row in zip(model.blocks, sums)
    ]


def layer_report(path: Path, errors: Sequence[BlockError]) -> list[dict[str, Any]]:
    """One entry per block: its BlockError and "linears", the rows of report.json that belong to it."""
    rows: list[dict[str, Any]] = []
    prefix = ""
    if (path / MANIFEST).is_file():
        report = read_json(path / "report.json")
        rows = [row for row in report.get("linears", ()) if isinstance(row, dict) and "name" in row]
        program = parse_program((path / "program.txt").read_text(encoding="utf-8"))
        prefix = str(program.attrs.get("blocks", ""))
    return [
        {**asdict(e), "linears": [r for r in rows if str(r["name"]).startswith(f"{prefix}.{e.block}.")]}
        for e in errors
    ]


def layer_table(report: Sequence[dict[str, Any]]) -> str:
    """The report as text: a line per block, with the mean and the worst of its linears."""
    lines = [
        "block  output error  token error  cosine   weight error  proxy loss  worst linear by proxy loss"
    ]
    for entry in report:
        figures = f"{entry['relative_error']:12.5f}  {entry['token_error']:11.5f}  {entry['cosine']:.5f}"
        line = f"{entry['block']:5d}  {figures}"
        linears = [r for r in entry["linears"] if {"relative_error", "proxy_loss"} <= set(r)]
        if linears:
            mean = [
                sum(float(r[k]) for r in linears) / len(linears) for k in ("relative_error", "proxy_loss")
            ]
            worst = max(linears, key=lambda r: float(r["proxy_loss"]))
            name = str(worst["name"]).partition(f".{entry['block']}.")[2]
            line += f"  {mean[0]:12.5f}  {mean[1]:10.5f}  {name} ({float(worst['proxy_loss']):.5f})"
        lines.append(line)
    return "\n".join(lines)


def _errors(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    y, x = theirs.double(), ours.double()
    energy, error = y.pow(2).sum(-1), (x - y).pow(2).sum(-1)
    ratio = torch.where(energy > 0, error / energy.clamp_min(1e-300), (error > 0).double())
    cosine = torch.nn.functional.cosine_similarity(x, y, -1, eps=1e-300)
    return torch.stack([error.sum(), energy.sum(), ratio.sum(), cosine.sum()])


def _cut_after(graph: Graph, wanted: list[Node]) -> None:
    """Make `wanted` the graph's outputs and drop what comes after the last of them."""
    kept, last = set(wanted), None
    for node in graph.nodes:
        last = node if node in kept else last
    for node in reversed(list(graph.nodes)):
        if node is last:
            break
        if node.op != "placeholder":
            graph.erase_node(node)
    graph.output(tuple(wanted))


def _is_activation(node: Node) -> bool:
    kind = str(node.meta.get("type", ""))
    return kind.startswith(("f32[", "bf16[", "f16[")) and kind.count(",") == 2 and ",t," in kind
