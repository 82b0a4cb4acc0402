"""Which checkpoint tensor is which parameter: names, ties, shapes and dtypes, checked before use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from liftc.checkpoint import CastCheckpoint, Checkpoint
from liftc.errors import CheckpointError
from liftc.spec import TensorSpec


@dataclass(frozen=True)
class WeightNames:
    """Names of a model's weights on disk.

    stored: path in the module tree -> name in the checkpoint. aliases: other names of the same tensor
    (tied weights) -> name in the checkpoint. untied: the config ties what the checkpoint keeps apart.
    """

    stored: Mapping[str, str]
    aliases: Mapping[str, str]
    untied: bool = False

    @classmethod
    def bind(cls, model: nn.Module, checkpoint: Checkpoint | None, where: str) -> WeightNames:
        """Match parameters and persistent buffers with the checkpoint.

        Raises CheckpointError when a tensor's shape is not the one that the config implies, or when the
        config states more blocks than the checkpoint can hold.
        """
        published = _published_names(model, checkpoint)
        stored: dict[str, str] = {}
        aliases: dict[str, str] = {}
        untied = False
        for paths, tensor in _tied_groups(model):
            found = [published[path] for path in paths if path in published]
            name = found[0] if found else paths[0]
            untied = untied or any(not _equal(checkpoint, name, other) for other in found[1:])
            if found and checkpoint is not None:
                _check_shape(checkpoint.spec(name), tuple(tensor.shape), name, where)
            stored |= {path: name for path in paths}
            aliases |= {path: name for path in paths if path != name}
        return cls(stored, aliases, untied)

    def checked(
        self, checkpoint: Checkpoint | None, tensors: Mapping[str, TensorSpec], where: str
    ) -> Checkpoint | None:
        """The checkpoint in the captured dtypes; raises CheckpointError when a tensor is missing."""
        if checkpoint is None:
            return None
        for name in tensors:
            if name not in checkpoint:
                raise CheckpointError(
                    f"{where}: the checkpoint lacks {name}, which the model in config.json needs"
                )
        return CastCheckpoint(checkpoint, {name: spec.dtype for name, spec in tensors.items()})


def _tied_groups(model: nn.Module) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Parameters and persistent buffers, those that are one tensor under several paths together."""
    persistent = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }
    groups: dict[torch.Tensor, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter, []).append(path)
    for path, buffer in model.named_buffers(remove_duplicate=False):
        if path in persistent:
            groups.setdefault(buffer, []).append(path)
    for tensor, paths in groups.items():
        yield paths, tensor


def _published_names(model: nn.Module, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Path in the module tree -> checkpoint name, for names that transformers spells differently on disk.

    Tensors that transformers would also reshape or merge are left out: they cannot be read as they are.
    """
    if checkpoint is None:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    paths = dict(model.named_parameters(remove_duplicate=False))
    published: dict[str, str] = {}
    for name in checkpoint.names():
        path, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, paths)
        if merged is None:
            published.setdefault(path, name)
    return published


def _equal(checkpoint: Checkpoint | None, name: str, other: str) -> bool:
    if checkpoint is None or name == other:
        return True
    if checkpoint.spec(name) != checkpoint.spec(other):
        return False
    return torch.equal(checkpoint.tensor(name), checkpoint.tensor(other))


def _check_shape(spec: TensorSpec, expected: tuple[int, ...], name: str, where: str) -> None:
    if spec.shape != expected:
        raise CheckpointError(
            f"{where}: {name} has shape {list(spec.shape)} but config.json implies {list(expected)}; "
            "the config and the weights are not of the same model"
        )
