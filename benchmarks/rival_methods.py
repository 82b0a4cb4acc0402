"""The quantizers benchmarks/rivals.py compares with: grids, GPTQ, HQQ, AWQ, as functions of one weight matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

Tensor = torch.Tensor


@dataclass(frozen=True)
class Grid:
    """scale, zero: float32 (OC, groups); weight = scale * (q - zero) with q in 0 ... 2^bits - 1."""

    scale: Tensor
    zero: Tensor
    bits: int
    group: int

    def round(self, weight: Tensor) -> Tensor:
        """The nearest representable weight, (OC, IC)."""
        w = grouped(weight, self.group)
        s, z = self.scale[:, :, None], self.zero[:, :, None]
        q = (torch.round(w / s) + z).clamp(0, 2**self.bits - 1)
        return ((q - z) * s).flatten(1)[:, : weight.shape[1]]


def grouped(weight: Tensor, group: int) -> Tensor:
    """(OC, IC) -> (OC, groups, group) float32; a short last group is filled with zeros, which every grid holds."""
    w = nn.functional.pad(weight.float(), (0, -weight.shape[1] % group))
    return w.view(len(w), -1, group)


def fit_grid(weight: Tensor, bits: int, group: int, *, clip: bool) -> Grid:
    """Min-max grid per row and group; with `clip` the range shrinks, in 40 steps to 0.2, to the least error."""
    w = grouped(weight, group)
    top, low = w.amax(-1).clamp_min(0), w.amin(-1).clamp_max(0)
    best: Grid | None = None
    least = torch.full_like(top, math.inf)
    for step in range(40 if clip else 1):
        share = 1 - 0.02 * step
        scale = ((top - low) * share / (2**bits - 1)).half().float().clamp_min(1e-7)
        zero = torch.round(-low * share / scale).clamp(0, 2**bits - 1)
        grid = Grid(scale, zero, bits, group)
        error = grouped(grid.round(weight) - weight, group).square().sum(-1)
        if best is None:
            best, least = grid, error
        else:
            better = error < least
            least = torch.where(better, error, least)
            best = Grid(
                torch.where(better, scale, best.scale), torch.where(better, zero, best.zero), bits, group
            )
    assert best is not None
    return best


def gptq(weight: Tensor, gram: Tensor, grid: Grid, damp: float = 0.01, block: int = 64) -> Tensor:
    """GPTQ (Frantar et al. 2023) of weight (OC, IC) under gram (IC, IC), columns by falling diagonal."""
    w, h = weight.float().clone(), gram.double()
    dead = h.diagonal() == 0
    h = h + torch.diag(dead.double()) + damp * h.diagonal().mean() * torch.eye(len(h), device=h.device)
    w[:, dead] = 0
    order = torch.argsort(h.diagonal(), descending=True)
    h = h[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True).float()
    which = (torch.arange(w.shape[1], device=w.device) // grid.group)[order]
    scale, zero = grid.scale[:, which].T.contiguous(), grid.zero[:, which].T.contiguous()
    columns = w[:, order].T.contiguous()
    done = torch.empty_like(columns)
    for first in range(0, len(columns), block):
        last = min(first + block, len(columns))
        job = ColumnBlock.of(last - first, len(w), 2**grid.bits - 1, w.device)
        done[first:last], errors = job.run(
            columns[first:last], scale[first:last], zero[first:last], factor[first:last, first:last]
        )
        columns[last:] -= factor[first:last, last:].T @ errors
    result = torch.empty_like(w)
    result[:, order] = done.T
    return result


class ColumnBlock:
    """GPTQ's loop over the columns of one block: some 500 small operations, one CUDA graph where there is a GPU."""

    made: ClassVar[dict[tuple[int, int, int, torch.device], ColumnBlock]] = {}

    def __init__(self, columns: int, rows: int, top: int, device: torch.device) -> None:
        self.part, self.scale, self.zero, self.done, self.errors = torch.ones(5, columns, rows, device=device)
        self.factor = torch.eye(columns, device=device)
        self.top = top
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.loop()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loop()

    @classmethod
    def of(cls, columns: int, rows: int, top: int, device: torch.device) -> ColumnBlock:
        key = (columns, rows, top, device)
        if key not in cls.made:
            cls.made[key] = cls(*key)
        return cls.made[key]

    def loop(self) -> None:
        for i in range(len(self.part)):
            scale, zero, done, error = self.scale[i], self.zero[i], self.done[i], self.errors[i]
            torch.div(self.part[i], scale, out=done)
            done.round_().add_(zero).clamp_(0, self.top).sub_(zero).mul_(scale)
            torch.sub(self.part[i], done, out=error)
            error.div_(self.factor[i, i])
            if i + 1 < len(self.part):
                self.part[i + 1 :].addr_(self.factor[i, i + 1 :], error, alpha=-1)

    def run(self, part: Tensor, scale: Tensor, zero: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """(rounded columns, their errors over the factor's diagonal), both to be used before the next call."""
        for own, given in ((self.part, part), (self.scale, scale), (self.zero, zero), (self.factor, factor)):
            own.copy_(given)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.loop()
        return self.done, self.errors


def hqq(weight: Tensor, bits: int, group: int, steps: int = 20) -> Tensor:
    """Half-quadratic quantization (Badri and Shaji 2023): float zero points by a shrunken residual, p = 0.7."""
    w = weight.float().view(-1, group)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    inverse = ((2**bits - 1) / (high - low).clamp_min(1e-8)).clamp_max(2e4)
    inverse = 1 / (1 / inverse).half().float()
    zero, beta, least = -low * inverse, 10.0, math.inf
    if bits == 4:
        zero = torch.round(zero)
    best = zero
    for _ in range(steps):
        q = torch.round(w * inverse + zero).clamp(0, 2**bits - 1)
        residual = w - (q - zero) / inverse
        error = residual.abs().mean().item()
        if error >= least:
            break
        best, least = zero, error
        small = residual.abs().clamp_min(1e-8).pow(0.7 - 1) / beta
        shrunk = residual.sign() * (residual.abs() - small).clamp_min(0)
        zero = (q - (w - shrunk) * inverse).mean(1, keepdim=True)
        beta *= 1.01
    best = best.half().float()
    q = torch.round(w * inverse + best).clamp(0, 2**bits - 1)
    rounded: Tensor = ((q - best) / inverse).view_as(weight)
    return rounded


def output_loss(error: Tensor, gram: Tensor) -> float:
    """tr(E H E') of a weight error (OC, IC): the mean squared output error times OC."""
    return float(((error.double() @ gram.double()) * error.double()).sum())


def awq_scales(weight: Tensor, gram: Tensor, magnitude: Tensor, bits: int, group: int) -> Tensor:
    """The scale magnitude^alpha, alpha in 0, 0.05 ... 0.95, of least output error (AWQ, Lin et al. 2024)."""
    best, least = torch.ones_like(magnitude), math.inf
    for step in range(20):
        s = magnitude.clamp_min(1e-4).pow(step / 20)
        s = s / (s.max() * s.min()).sqrt()
        scaled = weight * s
        error = fit_grid(scaled, bits, group, clip=False).round(scaled) / s - weight
        loss = output_loss(error, gram)
        if loss < least:
            best, least = s, loss
    return best


def awq_clip(weight: Tensor, gram: Tensor, bits: int, group: int) -> Tensor:
    """weight clamped per row and group at the share (1 ... 0.55) of its maximum with least output error."""
    w = grouped(weight, group)
    short = -len(gram) % group
    padded = nn.functional.pad(gram.float(), (0, short, 0, short))
    blocks = torch.stack([padded[i : i + group, i : i + group] for i in range(0, len(padded), group)])
    limit = w.abs().amax(-1, keepdim=True)
    best, least = w, torch.full(w.shape[:2], math.inf, device=w.device)
    for step in range(10):
        clipped = torch.minimum(torch.maximum(w, -limit * (1 - 0.05 * step)), limit * (1 - 0.05 * step))
        flat = clipped.flatten(1)[:, : weight.shape[1]]
        error = grouped(fit_grid(flat, bits, group, clip=False).round(flat), group) - w
        loss = torch.einsum("ogi,gij,ogj->og", error, blocks, error)
        best = torch.where((loss < least)[:, :, None], clipped, best)
        least = torch.minimum(loss, least)
    return best.flatten(1)[:, : weight.shape[1]]
