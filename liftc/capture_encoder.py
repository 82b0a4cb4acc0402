"""Export of a Hugging Face encoder: forward(input_ids [b,t], attention_mask [b,t], token_type_ids [b,t]?)."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from liftc.capture_export import export_quietly

_EXAMPLE_BATCH, _EXAMPLE_TOKENS = 3, 7


class _Encoder(nn.Module):
    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.hf(input_ids=input_ids, attention_mask=attention_mask)
        states: torch.Tensor = output.last_hidden_state
        return states


class _TypedEncoder(_Encoder):
    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        output = self.hf(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        states: torch.Tensor = output.last_hidden_state
        return states


def export_encoder(hf: PreTrainedModel) -> ExportedProgram:
    """Export an encoder with dynamic batch b and length t; attention_mask is 1 for tokens, 0 for padding.

    The graph returns last_hidden_state [b,t,hidden]; token_type_ids is an input when there are several types.
    """
    typed = "token_type_ids" in inspect.signature(hf.forward).parameters
    typed = typed and getattr(hf.config, "type_vocab_size", 0) > 1
    ids = torch.ones(_EXAMPLE_BATCH, _EXAMPLE_TOKENS, dtype=torch.int64)
    mask = torch.ones_like(ids)
    longest = getattr(hf.config, "max_position_embeddings", None)  # position tables are sliced up to t
    sizes = {0: Dim("b", min=1), 1: Dim("t", min=1, max=longest)}
    wrapper, inputs = (
        (_TypedEncoder(hf), (ids, mask, torch.zeros_like(ids))) if typed else (_Encoder(hf), (ids, mask))
    )
    return export_quietly(wrapper.eval(), inputs, (sizes,) * len(inputs))
