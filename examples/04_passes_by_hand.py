"""Capture a model, run the passes one by one, and look at the program in between.

python examples/04_passes_by_hand.py MODEL
"""

from __future__ import annotations

import sys
from pathlib import Path

from liftc.capture import capture
from liftc.format import LiftFormat
from liftc.passes.base import PassPipeline
from liftc.passes.pipeline import after_quantize, before_quantize
from liftc.plan import plan_program
from liftc.text import parse_program, print_program


def main(model: Path) -> str:
    """The lowered program as text; nothing is quantized and no weight is read."""
    program = capture(model).program
    for step in [*before_quantize(LiftFormat.parse("LQ-77/32")), *after_quantize()]:
        before = sum(len(graph.nodes) for graph in program.graphs.values())
        program = PassPipeline([step]).apply(program)
        after = sum(len(graph.nodes) for graph in program.graphs.values())
        print(f"{step.name:24s}{before:6d} -> {after:6d} nodes, {len(program.lifts):4d} lifts")
    print(f"planned: {plan_program(program).bits_per_weight:.4f} bits per weight")
    text = print_program(program)
    assert print_program(parse_program(text)) == text
    return text


if __name__ == "__main__":
    main(Path(sys.argv[1]))
