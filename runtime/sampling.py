"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liftc.errors import LiftcError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0 and top_p 1 keep every token. seed None draws a fresh one.

    Raises LiftcError for values outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise LiftcError(f"temperature must be 0 or more, got {self.temperature:g}")
        if self.top_k < 0:
            raise LiftcError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise LiftcError(f"top_p must lie in (0, 1], got {self.top_p:g}")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The random generator of one generation, or None when greedy."""
        if self.temperature == 0:
            return None
        generator = torch.Generator(device=device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def next_token(self, logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Token ids int64 (B, 1) from logits (B, vocab)."""
        scores = logits.float()
        if self.temperature == 0:
            return scores.argmax(-1, keepdim=True)
        scores = scores / self.temperature
        if self.top_k:
            kth = scores.topk(min(self.top_k, scores.shape[-1]), -1).values[..., -1:]
            scores = scores.masked_fill(scores < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(-1, descending=True)
            mass = ordered.softmax(-1)
            drop = mass.cumsum(-1) - mass >= self.top_p
            scores = torch.empty_like(scores).scatter_(-1, order, ordered.masked_fill(drop, -torch.inf))
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)
