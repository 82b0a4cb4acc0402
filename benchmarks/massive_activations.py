"""How loud the loudest tokens of a model are, and how much of the input grams they would take for themselves.

    python benchmarks/massive_activations.py MODEL [--windows 8] [--text FILE]

For every decoder block: the norm of the loudest hidden state over the median one, the share of all tokens in the
energy tr(H) of the block's loudest lift that belongs to 1 % of the tokens, plainly and as the quantizer weighs
tokens (liftc/quant/fisher.py), and the same for the loss of block correction (liftc/quant/correct.py).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch.fx import Node

from liftc.driver.compile import CompileOptions, prepare_job
from liftc.driver.quantize import all_positions, make_stream
from liftc.quant.activations import Budget
from liftc.quant.correct import token_weights
from liftc.quant.fisher import measure
from liftc.quant.result import QuantizeOptions


def top_share(energy: torch.Tensor) -> float:
    """Share of the sum that the largest 1 % of the entries hold."""
    count = max(1, len(energy) // 100)
    return float(energy.topk(count).values.sum() / energy.sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--text", type=Path, help="calibration text (default: the bundled one)")
    parser.add_argument("--captured", type=Path, help="folder that liftc capture wrote")
    a = parser.parse_args()
    job = prepare_job(
        a.model,
        CompileOptions(calibration_windows=a.windows, calibration=a.text, captured=a.captured),
    )
    with tempfile.TemporaryDirectory() as folder:
        stream = make_stream(
            job.captured, job.program, job.inputs, QuantizeOptions(), Path(folder), None, Budget(None)
        )
        fisher = measure(stream, language_model=True, shared=all_positions(job.inputs))
        runner = stream.new_runner(stream.stores())
        fetch = stream.checkpoint.tensor
        print(
            "block  loudest/median   energy of the loudest 1 %: linear          plain  weighed   loss plain  weighed"
        )
        for index, segment in enumerate(runner.segments):
            rows: list[tuple[float, float, str]] = []
            factors = fisher.segment(index, stream.device) if stream.groups(segment) else None
            for lift, names in stream.groups(segment).items():
                source, seen = stream.nodes[names[0]].args[0], []
                assert isinstance(source, Node) and factors is not None
                runner.observe(
                    index,
                    fetch,
                    {source: lambda x, seen=seen: seen.append(x.float().square().sum(-1).flatten())},
                )
                energy = torch.cat(seen)
                rows.append((top_share(energy), top_share(energy * factors.tokens[lift]), names[0]))
            runner.advance(index, fetch)
            if factors is None:
                continue
            node = max(runner.graph.outputs(index), key=lambda n: runner.value(0, n).numel())
            states = torch.cat([runner.value(n, node).float().flatten(0, -2) for n in range(len(runner))])
            norms = states.norm(dim=-1)
            plain = norms.square()
            weighed = plain * token_weights(states) * factors.block
            share, weighted, name = max(rows)
            print(
                f"{segment.block:5d} {norms.max() / norms.median():15.1f}   {name.split('.', 3)[-1]:38s}"
                f"{share:9.3f}{weighted:9.3f}{top_share(plain):13.3f}{top_share(weighed):9.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
