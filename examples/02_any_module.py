"""Lower the linear layers of any torch module: the example inputs trace it and calibrate it.

python examples/02_any_module.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import liftc


def main(out: Path) -> float:
    """Compile a small MLP at 3 bits; returns the relative error of its output."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 64)).eval()
    inputs = torch.randn(256, 256)
    liftc.compile(module, out, bits=3, beam=16, example_inputs=(inputs,), progress=False)
    lifted = liftc.load(out)
    wanted, got = module(inputs).detach(), lifted(inputs)
    return float((got - wanted).pow(2).mean() / wanted.pow(2).mean())


if __name__ == "__main__":
    print(f"relative output error {main(Path(sys.argv[1])):.4f}")
