"""One way into torch.export for every kind of capture: non-strict, without autograd, without debug extras."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram, export


def export_quietly(module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any) -> ExportedProgram:
    """`torch.export.export(strict=False)` under no_grad, warnings silenced; raises what torch raises.

    no_grad matters: otherwise every no_grad region of the model becomes a sub-graph of its own.
    """
    with torch.no_grad(), quiet_torch(), _without_debug_extras():
        return export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """No warnings and no log lines of failed fake ops: what goes wrong comes back as one exception."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_debug_extras() -> Iterator[None]:
    """No stack trace per node and no Python source per intermediate graph: a third of an export's time.

    Both switches are torch internals and only save time, so a torch without them is fine.
    """
    with ExitStack() as stack:
        try:
            from torch.fx._lazy_graph_module import _use_lazy_graph_module
        except ImportError:
            pass
        else:
            stack.enter_context(_use_lazy_graph_module(True))
        settings: Any = getattr(torch.fx, "config", None)
        if hasattr(settings, "do_not_emit_stack_traces"):
            before = settings.do_not_emit_stack_traces
            settings.do_not_emit_stack_traces = True
            stack.callback(setattr, settings, "do_not_emit_stack_traces", before)
        yield
