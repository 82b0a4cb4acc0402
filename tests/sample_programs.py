"""Small programs for the tests of passes and verifier, and what it takes to run them in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from liftc import reference
from liftc.program import Program, copy_graph
from liftc.spec import DTYPES
from liftc.tensor_names import packed_parts
from liftc.text import parse_program

_BLOCK_GRAPH = """
  graph NAME(%ids : i64[LEAD]) {
    %x = aten.embedding.default(@embed.weight, %ids) : f32[LEAD,64]
    %square = aten.pow.Tensor_Scalar(%x, 2) : f32[LEAD,64]  # block 0 layers.0.norm
    %mean = aten.mean.dim(%square, [-1], True) : f32[LEAD,1]  # block 0 layers.0.norm
    %root = aten.rsqrt.default(%mean) : f32[LEAD,1]  # block 0 layers.0.norm
    %unit = aten.mul.Tensor(%x, %root) : f32[LEAD,64]  # block 0 layers.0.norm
    %scaled = aten.mul.Tensor(@layers.0.norm.weight, %unit) : f32[LEAD,64]  # block 0 layers.0.norm
    %q = aten.linear.default(%scaled, @layers.0.attn.q.weight, @q.bias) : f32[LEAD,64]  # block 0 layers.0
    %k = aten.linear.default(%scaled, @layers.0.attn.k.weight) : f32[LEAD,32]  # block 0 layers.0.attn.k
    %v = aten.linear.default(%scaled, @layers.0.attn.v.weight) : f32[LEAD,32]  # block 0 layers.0.attn.v
    %kv = aten.cat.default([%k, %v], -1) : f32[LEAD,64]  # block 0 layers.0.attn
    %mixed = aten.mul.Tensor(%q, %kv) : f32[LEAD,64]  # block 0 layers.0.attn
    %o = aten.linear.default(%mixed, @layers.0.attn.o.weight) : f32[LEAD,64]  # block 0 layers.0.attn.o
    %add = aten.add.Tensor(%x, %o) : f32[LEAD,64]  # block 0 layers.0
    %gate = aten.linear.default(%add, @layers.0.mlp.gate.weight) : f32[LEAD,96]  # block 0 layers.0.mlp.gate
    %up = aten.linear.default(%add, @layers.0.mlp.up.weight) : f32[LEAD,96]  # block 0 layers.0.mlp.up
    %act = aten.silu.default(%gate) : f32[LEAD,96]  # block 0 layers.0.mlp
    %product = aten.mul.Tensor(%act, %up) : f32[LEAD,96]  # block 0 layers.0.mlp
    %down = aten.linear.default(%product, @layers.0.mlp.down.weight) : f32[LEAD,64]  # block 0 layers.0.mlp
    %last = aten.add.Tensor(%add, %down) : f32[LEAD,64]  # block 0 layers.0
    %head = aten.linear.default(%last, @lm_head.weight) : f32[LEAD,128]  # block -1 lm_head
    return %head
  }
"""

BLOCK_TEXT = (
    """program "block" {
  attr vocab_size = 128

  tensor @embed.weight : f32[128,64]
  tensor @layers.0.norm.weight : f32[64]
  tensor @layers.0.attn.q.weight : f32[64,64]
  tensor @q.bias : f32[64]
  tensor @layers.0.attn.k.weight : f32[32,64]
  tensor @layers.0.attn.v.weight : f32[32,64]
  tensor @layers.0.attn.o.weight : f32[64,64]
  tensor @layers.0.mlp.gate.weight : f32[96,64]
  tensor @layers.0.mlp.up.weight : f32[96,64]
  tensor @layers.0.mlp.down.weight : f32[64,96]
  tensor @lm_head.weight : f32[128,64]
"""
    + _BLOCK_GRAPH.replace("NAME", "prefill").replace("LEAD", "1,t")
    + _BLOCK_GRAPH.replace("NAME", "decode").replace("LEAD", "1,1")
    + "}\n"
)
"""One decoder block of a made-up architecture with a head, as prefill and decode."""

CONV1D_TEXT = """program "conv1d" {
  tensor @h.0.attn.weight : f32[64,96]
  tensor @h.0.attn.bias : f32[96]
  tensor @h.0.proj.weight : f32[96,64]
  tensor @h.0.proj.bias : f32[64]

  graph forward(%x : f32[2,t,64]) {
    %to = aten.to.dtype(%x, dtype(f32)) : f32[2,t,64]
    %view = aten.view.default(%to, [-1, 64]) : f32[2*t,64]  # block 0 h.0.attn
    %addmm = aten.addmm.default(@h.0.attn.bias, %view, @h.0.attn.weight) : f32[2*t,96]  # block 0 h.0.attn
    %size = aten.sym_size.int(%x, 1)
    %view_1 = aten.view.default(%addmm, [2, %size, 96]) : f32[2,t,96]  # block 0 h.0.attn
    %gelu = aten.gelu.default(%view_1, approximate="tanh") : f32[2,t,96]  # block 0 h.0
    %drop = aten.dropout.default(%gelu, 0.1, False) : f32[2,t,96]  # block 0 h.0
    %view_2 = aten.view.default(%drop, [-1, 96]) : f32[2*t,96]  # block 0 h.0.proj
    %addmm_1 = aten.addmm.default(@h.0.proj.bias, %view_2, @h.0.proj.weight) : f32[2*t,64]  # block 0 h.0.proj
    %view_3 = aten.view.default(%addmm_1, [2, %size, 64]) : f32[2,t,64]  # block 0 h.0.proj
    return %view_3
  }
}
"""
"""GPT-2's Conv1D twice: flatten, addmm with a weight of [in, out], un-flatten."""


def block_program() -> Program:
    return parse_program(BLOCK_TEXT)


def random_tensors(program: Program, seed: int = 0) -> dict[str, torch.Tensor]:
    """A value for every stored tensor: signs at random, scales positive, weights small."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, spec in sorted(program.tensors.items()):
        if spec.dtype == "i32":
            words = torch.randint(-(2**31), 2**31, spec.shape, generator=generator)
            tensors[name] = words.to(torch.int32)
        else:
            value = torch.randn(spec.shape, generator=generator) / max(1, spec.shape[-1]) ** 0.5
            value = value.abs() + 0.5 if name.endswith("_scale") else value
            tensors[name] = value.to(DTYPES[spec.dtype])
    return tensors


def stacked_tensors(program: Program, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of `program` from those of the same program before its rows were fused."""
    result = {name: tensors[name] for name in program.tensors if name in tensors}
    for packed, members in packed_parts(program).items():
        owner = packed.removesuffix(".packed_weight")
        for suffix in ("packed_weight", "output_scale"):
            parts = [tensors[f"{member}.{suffix}"] for member in members]
            result[f"{owner}.{suffix}"] = torch.cat(parts)
    return result


def run_graph(program: Program, graph: str, tensors: dict[str, torch.Tensor], *inputs: Any) -> Any:
    """Run a graph of a program on CPU, with kernels of the lift ops where they are registered, else their reference."""
    # As the loader does: kernels take output scales in float32, whatever the checkpoint stores.
    values = {name: t.float() if name.endswith(".output_scale") else t for name, t in tensors.items()}
    for name, (_, operands) in program.folded.items():
        values[name] = reference.decode_right(*(tensors[operand] for operand in operands))
    bound = copy_graph(program.graphs[graph])
    root: dict[str, torch.Tensor] = {}
    for index, node in enumerate(n for n in bound.nodes if n.op == "get_attr"):
        root[f"tensor_{index}"] = values[str(node.target)]
        node.target = f"tensor_{index}"
    with torch.no_grad():
        return GraphModule(root, bound)(*inputs)
