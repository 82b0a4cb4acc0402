"""A Llama-like model of two blocks in plain torch, exported as prefill and decode without any library."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.nn import functional

from liftc.program import Program, type_text
from liftc.spec import DTYPE_NAMES, TensorSpec

VOCAB, HIDDEN, HEADS, GROUPS, HEAD_DIM, INNER, BLOCKS, LENGTH = 96, 64, 4, 2, 16, 96, 2, 24


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * scaled.to(x.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.mlp_norm = Norm(), Norm()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.k_proj = nn.Linear(HIDDEN, GROUPS * HEAD_DIM)
        self.v_proj = nn.Linear(HIDDEN, GROUPS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, position: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        y = self.input_norm(x)
        q = self.q_proj(y).view(1, y.shape[1], HEADS, HEAD_DIM).transpose(1, 2)
        new_k = self.k_proj(y).view(1, y.shape[1], GROUPS, HEAD_DIM).transpose(1, 2)
        new_v = self.v_proj(y).view(1, y.shape[1], GROUPS, HEAD_DIM).transpose(1, 2)
        k.index_copy_(2, position, new_k)
        v.index_copy_(2, position, new_v)
        wide_k, wide_v = (c.repeat_interleave(HEADS // GROUPS, dim=1) for c in (k, v))
        attended = functional.scaled_dot_product_attention(q, wide_k, wide_v, mask)
        x = x + self.o_proj(attended.transpose(1, 2).reshape(1, y.shape[1], HEADS * HEAD_DIM))
        y = functional.dropout(self.mlp_norm(x), 0.1, self.training)
        return x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))


class TinyLlama(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = Norm()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(
        self, input_ids: torch.Tensor, cache_position: torch.Tensor, *caches: torch.Tensor
    ) -> torch.Tensor:
        x = self.embed(input_ids)
        mask = (torch.arange(LENGTH, device=x.device)[None, :] <= cache_position[:, None])[None, None]
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, cache_position, caches[2 * i], caches[2 * i + 1])
        return self.lm_head(self.norm(x))


def new_caches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(1, GROUPS, LENGTH, HEAD_DIM, dtype=dtype) for _ in range(2 * BLOCKS)]


def tiny_llama(dtype: torch.dtype = torch.float32) -> tuple[Program, dict[str, torch.Tensor]]:
    """(program with prefill and decode, its tensors)."""
    model = TinyLlama().to(dtype).eval().requires_grad_(False)
    program = Program("tiny_llama")
    for name, tokens in (("prefill", 5), ("decode", 1)):
        inputs = (torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens), *new_caches(dtype))
        t = Dim("t", min=2, max=LENGTH - 1) if name == "prefill" else None
        shapes = ({1: t}, {0: t}, *[None] * (2 * BLOCKS)) if t else None
        with torch.no_grad():
            # the varargs of forward are one entry of the shapes
            exported = export(
                model, inputs, dynamic_shapes=shapes and (*shapes[:2], shapes[2:]), strict=False
            )
        program.graphs[name] = as_graph(exported, program.tensors)
    return program, dict(model.state_dict())


def as_graph(exported: ExportedProgram, tensors: dict[str, TensorSpec]) -> Graph:
    """The exported graph in Program form, its tensors added to the table."""
    weights = {s.arg.name: str(s.target) for s in exported.graph_signature.input_specs
               if s.kind in (InputKind.PARAMETER, InputKind.BUFFER)}  # fmt: skip
    symbols = {str(symbol) for symbol in exported.range_constraints}
    graph, made = Graph(), {}
    for node in exported.graph.nodes:
        kind = type_text(node.meta.get("val"))
        for symbol in symbols:
            kind = re.sub(rf"\b{symbol}\b", "t", kind)
        if node.name in weights:
            name = weights[node.name]
            value = node.meta["val"]
            tensors[name] = TensorSpec(tuple(value.shape), DTYPE_NAMES[value.dtype])
            new = graph.create_node("get_attr", name, name=node.name)
        elif node.op == "output":
            graph.output(made[node.args[0][-1]])
            continue
        else:
            args = map_arg(node.args, lambda n: made[n])
            new = graph.create_node(
                node.op, node.target, args, map_arg(node.kwargs, lambda n: made[n]), node.name
            )
        block, source = place_of(node)
        new.meta = {"type": kind, "block": block, "source": source}
        made[node] = new
    return graph


def place_of(node: Node) -> tuple[int, str]:
    stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    source = stack[-1] if stack else ""
    match = re.search(r"layers\.(\d+)", source)
    return (int(match[1]) if match else -1), source
