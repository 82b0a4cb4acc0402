"""Held-out quality: perplexity, KL divergence and top-1 agreement against the original model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from liftc.errors import LiftcError

Logits = Callable[[torch.Tensor], torch.Tensor]
CHUNK = 256
"""Positions whose log-probabilities are held at once."""


@dataclass(frozen=True)
class Evaluation:
    """perplexity: exp of the mean negative log-likelihood of every token but each window's first. kl: mean
    KL(reference || model) in nats per predicted token. top1: share of predicted tokens whose most likely
    token agrees. tokens: number of predicted tokens. The reference fields are None without a reference."""

    perplexity: float
    tokens: int
    windows: int
    context: int
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None

    def to_json(self) -> dict[str, float | int | None]:
        """Plain dict of the fields."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    windows: Sequence[torch.Tensor], model: Logits, reference: Logits | None = None, *, progress: bool = False
) -> Evaluation:
    """Evaluate callables that map input_ids int64 (1, T) to logits (1, T, vocab) on non-overlapping windows.

    Log-probabilities are float32 for logits of half precision, sums are float64. Raises LiftcError for logits
    that are NaN and for two models of different vocabularies.
    """
    nll = reference_nll = kl = agree = 0.0
    count = 0
    for number, ids in enumerate(tqdm(windows, desc="evaluate", unit="window", disable=not progress)):
        ours = model(ids)[0]
        theirs = reference(ids)[0] if reference is not None else None
        if theirs is not None and theirs.shape != ours.shape:
            raise LiftcError(
                f"the model has {ours.shape[-1]} tokens and the reference {theirs.shape[-1]}; "
                "compare with the model the artifact was compiled from"
            )
        for start in range(0, ids.shape[1] - 1, CHUNK):
            stop = min(start + CHUNK, ids.shape[1] - 1)
            gold = ids[0, start + 1 : stop + 1, None].to(ours.device)
            log_p = _log_probabilities(ours[start:stop])
            nll -= _sum(log_p.gather(1, gold), f"the model in window {number}")
            if theirs is not None:
                log_q = _log_probabilities(theirs[start:stop]).to(log_p.device)
                reference_nll -= _sum(log_q.gather(1, gold), f"the reference in window {number}")
                kl += divergence(log_q, log_p).sum().item()
                agree += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
        count += ids.shape[1] - 1
    context = windows[0].shape[1]
    if reference is None:
        return Evaluation(_exp(nll / count), count, len(windows), context)
    return Evaluation(
        _exp(nll / count), count, len(windows), context,
        _exp(reference_nll / count), kl / count, agree / count,
    )  # fmt: skip


def divergence(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(q || p) in nats of log-probabilities (..., vocab) -> float64 (...), at least 0.

    A token that q rules out adds nothing, also where p rules it out; one that only p rules out makes it infinite.
    """
    q = log_q.exp()
    result = (q * (log_q - log_p)).sum(-1, dtype=torch.float64)
    if torch.isnan(result).any():
        result = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1, dtype=torch.float64)
    return result.clamp_min(0.0)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _sum(values: torch.Tensor, what: str) -> float:
    total = values.double().sum().item()
    if math.isnan(total):
        raise LiftcError(f"the logits of {what} are NaN; the weights or the kernels are broken")
    return total


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
