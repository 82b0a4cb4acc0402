"""Held-out quality: perplexity, KL divergence and top-1 agreement against the original model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

Logits = Callable[[torch.Tensor], torch.Tensor]
CHUNK = 256


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

    Sums are float64; log-probabilities are float32 whatever the dtype of the logits.
    """
    nll = reference_nll = kl = agree = 0.0
    count = 0
    for ids in tqdm(windows, desc="evaluate", unit="window", disable=not progress):
        ours = model(ids)[0]
        theirs = reference(ids)[0] if reference is not None else None
        for start in range(0, ids.shape[1] - 1, CHUNK):
            stop = min(start + CHUNK, ids.shape[1] - 1)
            gold = ids[0, start + 1 : stop + 1, None].to(ours.device)
            log_p = ours[start:stop].float().log_softmax(-1)
            nll -= log_p.gather(1, gold).double().sum().item()
            if theirs is not None:
                log_q = theirs[start:stop].float().log_softmax(-1).to(log_p.device)
                reference_nll -= log_q.gather(1, gold).double().sum().item()
                kl += (log_q.exp() * (log_q - log_p)).double().sum().item()
                agree += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
        count += ids.shape[1] - 1
    context = windows[0].shape[1]
    if reference is None:
        return Evaluation(math.exp(nll / count), count, len(windows), context)
    return Evaluation(
        math.exp(nll / count), count, len(windows), context,
        math.exp(reference_nll / count), kl / count, agree / count,
    )  # fmt: skip
