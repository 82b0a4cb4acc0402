"""All passes by their name on the command line; a pass's module is imported when the pass is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from liftc.passes.base import Pass, PassError


def _lazy(module: str, name: str) -> Callable[[], type[Pass]]:
    def load() -> type[Pass]:
        found: type[Pass] = getattr(import_module(f"liftc.passes.{module}"), name)
        return found

    return load


PASSES: dict[str, Callable[[], type[Pass]]] = {
    "canonicalize": _lazy("canonicalize", "Canonicalize"),
    "select-linears": _lazy("select_linears", "SelectLinears"),
    "assign-formats": _lazy("assign_formats", "AssignFormats"),
    "share-transforms": _lazy("share_transforms", "ShareTransforms"),
    "lower-linears": _lazy("lower_linears", "LowerLinears"),
    "fuse-row-groups": _lazy("fuse_row_groups", "FuseRowGroups"),
    "fold-decode-transform": _lazy("fold_decode_transform", "FoldDecodeTransform"),
    "choose-order": _lazy("choose_order", "ChooseOrder"),
    "plan-layout": _lazy("plan_layout", "PlanLayout"),
}


def get_pass(name: str) -> type[Pass]:
    """The class of a pass; raises PassError listing the names there are."""
    if name not in PASSES:
        raise PassError(f"there is no pass {name!r}; the passes are {', '.join(PASSES)}")
    return PASSES[name]()
