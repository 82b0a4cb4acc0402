"""Intra-block correction (paper, eq. 5): train what is continuous against the output of the original block.

The signs stay as they are. Targets come from the original model on its own activations, inputs from the
quantized prefix, so a block also mends what earlier blocks broke. Batches held out decide when to stop, and
a block is never left worse than it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from liftc.errors import QuantizeError
from liftc.quant.blocks import BlockRunner
from liftc.quant.parallel import Ranks
from liftc.quant.trainable import Rates, Trainable

Targets = Callable[[int, Node], torch.Tensor]
WARM_UP_STEPS = 5
LOUD_TOKENS = 3.0
"""Tokens whose output is larger than this multiple of the median (massive activations) count less."""


@dataclass(frozen=True)
class Fit:
    """Held-out loss before and after training, and the epochs that were kept."""

    before: float
    after: float
    epochs: int


def fit(
    trainable: Trainable,
    loss: Callable[[int], torch.Tensor],
    train: Sequence[int],
    held_out: Sequence[int],
    *,
    epochs: int,
    rates: Rates,
    dense: bool,
    seed: int,
    ranks: Ranks | None = None,
) -> Fit:
    """Minimise loss(batch) over `train` with Adam and a cosine schedule; keeps the epoch that is best on
    `held_out`, or nothing. Processes of `ranks` step together on batches of their own. Raises QuantizeError
    when the loss is not finite."""
    ranks = ranks or Ranks()
    groups = [
        {"params": tensors, "lr": getattr(rates, kind)} for kind, tensors in trainable.parameters(dense=dense)
    ]
    tensors = [t for group in groups for t in group["params"]]
    if not tensors or not train or not held_out or epochs < 1:
        return Fit(math.nan, math.nan, 0)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    steps, step = epochs * len(train), 0
    first = best = _mean_loss(loss, held_out, ranks, tensors[0].device)
    kept, kept_epochs = [t.clone() for t in tensors], 0
    for tensor in tensors:
        tensor.requires_grad_(True)
    for epoch in range(epochs):
        for position in torch.randperm(len(train), generator=generator).tolist():
            warm = min(1.0, (step + 1) / WARM_UP_STEPS)
            factor = warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss(train[position]), inputs=tensors)
            for tensor in tensors if ranks.size > 1 else ():
                assert tensor.grad is not None
                ranks.sum(tensor.grad).div_(ranks.size)
            optimizer.step()
            step += 1
        now = _mean_loss(loss, held_out, ranks, tensors[0].device)
        if now < best:
            best, kept, kept_epochs = now, [t.detach().clone() for t in tensors], epoch + 1
    with torch.no_grad():
        for tensor, value in zip(tensors, kept):
            tensor.requires_grad_(False)
            tensor.copy_(value)
    return Fit(first, best, kept_epochs)


@torch.no_grad()
def _mean_loss(
    loss: Callable[[int], torch.Tensor], batches: Sequence[int], ranks: Ranks, device: torch.device
) -> float:
    value = ranks.mean(sum(loss(number).item() for number in batches) / len(batches), device)
    if not math.isfinite(value):
        raise QuantizeError(
            "the output of a block is not finite; use --dtype float32 or check the model's weights"
        )
    return value


def block_loss(
    runner: BlockRunner,
    index: int,
    trainable: Trainable,
    targets: Targets,
    importance: Callable[[int], torch.Tensor] | None = None,
) -> Callable[[int], torch.Tensor]:
    """Relative squared error of the outputs of segment `index`, loud tokens weighed down.

    importance: further weights (tokens,) of a batch's tokens (fisher.py).
    """

    def loss(number: int) -> torch.Tensor:
        error = energy = torch.zeros((), device=runner.device)
        extra = None if importance is None else importance(number)
        for node, value in runner.outputs(index, number, trainable.weights()).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                target = targets(number, node).to(runner.device).float()
                weight = token_weights(target)
                if extra is not None and extra.numel() == weight.numel():
                    weight = weight * extra.view(weight.shape)
                error = error + ((value.float() - target).square().sum(-1) * weight).sum()
                energy = energy + (target.square().sum(-1) * weight).sum()
        return error / energy.clamp_min(1e-30)

    return loss


def token_weights(target: torch.Tensor) -> torch.Tensor:
    """Weights (...,) of tokens with outputs (..., n): 1, or (LOUD_TOKENS median / norm)^2 for louder ones."""
    norms = target.norm(dim=-1)
    limit = LOUD_TOKENS * norms.median()
    return (limit / norms.clamp_min(1e-30)).clamp_max(1.0).square() if limit > 0 else torch.ones_like(norms)
