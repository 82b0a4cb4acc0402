"""CUDA graphs of decoding, on a GPU; what they stand for is in tests/test_decoding.py."""

from __future__ import annotations

import pytest
import torch
from test_decoding import decoded, graphs

from liftc.runtime.decoding import Decoder, Decoders

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5]


@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_a_captured_sequence_and_the_next_are_those_of_launches(index: int) -> None:
    device = torch.device("cuda", index)  # of several GPUs also one that is not the current one
    want = decoded(Decoder(graphs(device), len(TOKENS), None), TOKENS)
    assert want == [sum(TOKENS[: i + 1]) for i in range(len(TOKENS))]
    decoders = Decoders(graphs(device), device, True)
    first = decoders.take(len(TOKENS), 1000)
    assert decoded(first, TOKENS) == want and first._captured is not None
    decoders.give_back(first)
    again = decoders.take(len(TOKENS), 1000)
    assert again is first and decoded(again, TOKENS[::-1]) == [
        sum(TOKENS[::-1][: i + 1]) for i in range(len(TOKENS))
    ]
