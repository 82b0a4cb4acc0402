"""Capture of Hugging Face models from their config: built without weights, bound to a checkpoint by name.

The model is built with fake parameters (no memory) and real buffers, so that what a constructor computes,
such as rotary frequencies, is exact and becomes part of the captured checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from liftc.capture import Captured
from liftc.capture_encoder import export_encoder
from liftc.capture_export import quiet_torch
from liftc.capture_graph import LoweredGraph, Naming, lower_exported
from liftc.capture_lm import SDPA, AttentionUnsupported, export_language_model, record_cache_shapes
from liftc.capture_module import find_blocks, first_line
from liftc.capture_weights import WeightNames
from liftc.checkpoint import Checkpoint, OverlayCheckpoint, StateDictCheckpoint
from liftc.errors import CaptureError, LiftcError
from liftc.program import Attribute, Program
from liftc.spec import DTYPE_NAMES, DTYPES

TORCH_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("sdpa", "eager")


def parse_config(settings: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """Config object of a config.json; raises CaptureError for an unknown, remote-code or quantized model."""
    model_type = settings.get("model_type")
    if not isinstance(model_type, str):
        raise CaptureError(f"{where} has no model_type, so the architecture is unknown; fix config.json")
    if model_type not in CONFIG_MAPPING:
        reason = "brings its own code, which liftc never runs" if "auto_map" in settings else "is unknown"
        raise CaptureError(
            f"{where}: model_type {model_type!r} {reason}; choose a model that transformers has"
        )
    if settings.get("quantization_config"):
        method = settings["quantization_config"].get("quant_method", "unknown")
        raise CaptureError(f"{where}: the model is already quantized ({method}); give the original weights")
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(settings)))
    except Exception as error:
        raise CaptureError(
            f"{where}: config.json of {model_type} is not valid: {first_line(error)}"
        ) from error
    return config


def model_kind(config: PreTrainedConfig, where: str) -> str:
    """ "causal-lm" or "encoder"; raises CaptureError for anything else."""
    name, model_type = architecture_name(config), config.model_type
    if config.is_encoder_decoder:
        raise CaptureError(
            f"{where}: {name} is an encoder-decoder model; liftc captures decoders and encoders"
        )
    if name.endswith(("ForCausalLM", "LMHeadModel")) and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal-lm"
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    raise CaptureError(f"{where}: {name} is neither a causal language model nor an encoder that liftc knows")


def architecture_name(config: PreTrainedConfig) -> str:
    """Class name from the config, or the default class of its model_type."""
    if config.architectures:
        return str(config.architectures[0])
    for table in (MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if config.model_type in table:
            return str(table[config.model_type])
    return str(config.model_type)


def capture_hf(
    config: PreTrainedConfig,
    checkpoint: Checkpoint | None,
    settings: dict[str, Any],
    where: str,
    dtype: str | None = None,
    attention: str | None = None,
) -> Captured:
    """Capture the model of a config; see `liftc.capture.capture` for the options and errors.

    Without a checkpoint the graphs are the same and the result holds only the computed buffers.
    """
    kind, name = model_kind(config, where), architecture_name(config)
    _refuse_what_no_graph_holds(config, where, name)
    if attention not in (None, *ATTENTIONS):
        raise CaptureError(f"unknown attention {attention!r}: choose {' or '.join(ATTENTIONS)}")
    torch_dtype = _resolve_dtype(config, checkpoint, dtype)
    attempts = [attention] if attention else list(ATTENTIONS)
    for attempt in attempts:
        try:
            with quiet_torch():
                return _capture(
                    copy.deepcopy(config), checkpoint, settings, where, torch_dtype, attempt, kind
                )
        except AttentionUnsupported as error:
            reason = first_line(error)
        except LiftcError:
            raise
        except Exception as error:
            raise CaptureError(f"{where}: {name} cannot be captured: {first_line(error)}") from error
    raise CaptureError(f"{where}: {name} cannot be captured with sdpa attention ({reason}); try eager")


def _capture(
    config: PreTrainedConfig,
    checkpoint: Checkpoint | None,
    settings: dict[str, Any],
    where: str,
    dtype: torch.dtype,
    attention: str,
    kind: str,
) -> Captured:
    implementation = SDPA if attention == "sdpa" else attention
    fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    model = build_model(config, dtype, implementation, kind, fake_mode)
    names = WeightNames.bind(model, checkpoint, where)
    if names.untied:  # config.json ties two tensors that the checkpoint stores with different values
        config.tie_word_embeddings = False
        model = build_model(config, dtype, implementation, kind, fake_mode)
        names = WeightNames.bind(model, checkpoint, where)
    blocks = find_blocks(model)
    attrs = _describe(config, model, blocks, dtype, kind, attention)
    if kind == "causal-lm":
        shapes = record_cache_shapes(model, fake_mode)
        first = next(iter(shapes.values()))
        attrs |= {"num_kv_heads": first.key[0], "head_dim": first.key[1]}
        exported = export_language_model(model, shapes, dtype)
    else:
        exported = {"forward": export_encoder(model)}
    graphs: dict[str, LoweredGraph] = {}
    for graph_name, step in exported.items():
        naming = Naming("hf", blocks, names.stored, size_symbols(step), f"constant.{graph_name}")
        graphs[graph_name] = lower_exported(step, naming)
    tensors = {name: spec for graph in graphs.values() for name, spec in graph.tensors.items()}
    extra = {name: value for graph in graphs.values() for name, value in graph.constants.items()}
    program = Program(
        name=str(attrs["architecture"]),
        graphs={name: graph.graph for name, graph in graphs.items()},
        tensors=dict(sorted(tensors.items())),
        attrs=attrs,
    )
    weights = names.checked(checkpoint, {k: v for k, v in tensors.items() if k not in extra}, where)
    full = OverlayCheckpoint(weights or StateDictCheckpoint({}), extra, names.aliases)
    return Captured(program, full, dict(settings), "causal-lm" if kind == "causal-lm" else "module")


def _refuse_what_no_graph_holds(config: PreTrainedConfig, where: str, name: str) -> None:
    """One clear sentence for models whose computation depends on the data in ways a graph cannot express."""
    experts = [
        getattr(config, key, 0) or 0 for key in ("num_local_experts", "num_experts", "n_routed_experts")
    ]
    if max(experts) > 1:
        raise CaptureError(
            f"{where}: {name} routes tokens to {max(experts)} experts, which liftc cannot capture"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(v.get("rope_type") for v in rope.values() if isinstance(v, dict))}
    if changing := kinds & {"dynamic", "longrope"}:
        raise CaptureError(
            f"{where}: {name} uses {changing.pop()} rotary embeddings, which change with the length of the text "
            "and fit no fixed graph"
        )


def _resolve_dtype(config: PreTrainedConfig, checkpoint: Checkpoint | None, dtype: str | None) -> torch.dtype:
    """The dtype asked for, else what the config states, else that of the weights, else float32."""
    if dtype is not None:
        if dtype not in TORCH_NAMES:
            raise CaptureError(f"unknown dtype {dtype!r}: choose {', '.join(TORCH_NAMES)}")
        return TORCH_NAMES[dtype]
    if config.dtype is not None:
        stated = TORCH_NAMES.get(str(config.dtype).removeprefix("torch."))
        if stated is None:
            raise CaptureError(
                f"config.json states dtype {config.dtype}; give dtype= as {', '.join(TORCH_NAMES)}"
            )
        return stated
    for name in checkpoint.names() if checkpoint else ():
        if (stored := DTYPES[checkpoint.spec(name).dtype]) in TORCH_NAMES.values():  # type: ignore[union-attr]
            return stored
    return torch.float32


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter loses its storage the moment a module registers it; buffers stay real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_model(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str, kind: str, fake_mode: FakeTensorMode
) -> PreTrainedModel:
    """The model with fake CPU parameters and real buffers, in evaluation mode."""
    maker = AutoModelForCausalLM if kind == "causal-lm" else AutoModel
    try:
        with _parameters_on_meta():
            model: PreTrainedModel = maker.from_config(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, KeyError) as error:
        unknown = isinstance(error, KeyError) and error.args == (attention,)
        if attention == SDPA and (unknown or "scaled_dot_product_attention" in str(error)):
            raise AttentionUnsupported("the model has its own attention classes") from error
        raise
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    with fake_mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if parameter not in fakes:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                        fakes[parameter] = nn.Parameter(empty, requires_grad=False)
                    module._parameters[name] = fakes[parameter]
    return model.eval()


def size_symbols(exported: Any) -> dict[Any, str]:
    """Readable names of the symbols of the sizes of our own graph inputs."""
    inputs = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    known = [
        ("input_ids", 0, "b"),
        ("input_ids", 1, "t"),
        ("logit_positions", 0, "n"),
        ("k_cache_0", 2, "s"),
    ]
    symbols: dict[Any, str] = {}
    for name, dim, letter in known:
        if name in inputs and not isinstance(size := inputs[name].shape[dim], int):
            symbols[size.node.expr] = letter
    return symbols


def _describe(
    config: PreTrainedConfig, model: nn.Module, blocks: str, dtype: torch.dtype, kind: str, attention: str
) -> dict[str, Attribute]:
    """Program.attrs: facts about the model, dtype as a key of `liftc.spec.DTYPES`."""
    attrs: dict[str, Attribute] = {
        "architecture": type(model).__name__,
        "model_type": config.model_type,
        "kind": "causal-lm" if kind == "causal-lm" else "module",
        "route": "graph",
        "dtype": DTYPE_NAMES[dtype],
        "attention": attention,
        "blocks": blocks,
        "num_layers": len(model.get_submodule(blocks)) if blocks else 0,  # type: ignore[arg-type]
    }
    for key in ("hidden_size", "vocab_size", "max_position_embeddings"):
        if isinstance(value := getattr(config, key, None), int):
            attrs[key] = value
    return attrs
