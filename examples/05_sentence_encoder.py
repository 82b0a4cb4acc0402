"""Compile a sentence encoder and compare sentences with the result.

    python examples/05_sentence_encoder.py MODEL OUT [BITS]

MODEL is a Hugging Face folder of a BERT-like encoder whose card asks for mean pooling, such as all-MiniLM-L6-v2;
OUT must not exist yet. Sentences are short, so calibration is on many short windows rather than a few long ones.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import liftc

SENTENCES = (
    "A man is eating a bowl of pasta.",
    "Someone has noodles for lunch.",
    "The sky is full of stars.",
)


def embed(model: torch.nn.Module, tokenizer: liftc.Tokenizer, sentences: Sequence[str]) -> torch.Tensor:
    """Unit vectors (sentences, hidden): the mean of the last hidden states of a sentence's own tokens."""
    rows = [torch.tensor(tokenizer.encode(sentence)) for sentence in sentences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    states = model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).float()
    weight = mask[:, :, None].to(states)
    return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def main(model: Path, out: Path, bits: float = 3.0, windows: int = 1024) -> torch.Tensor:
    """Compile and load; returns the cosine similarities of SENTENCES."""
    liftc.compile(model, out, bits=bits, calibration_windows=windows, calibration_length=32, progress=False)
    vectors = embed(liftc.load(out), liftc.Tokenizer(out), SENTENCES)
    return vectors @ vectors.T


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2]), *map(float, sys.argv[3:])))
