"""The pipeline on one page: which passes run, in which order, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from liftc.format import LiftFormat
from liftc.passes.assign_formats import AssignFormats
from liftc.passes.base import Pass, PassError
from liftc.passes.canonicalize import Canonicalize
from liftc.passes.choose_order import ChooseOrder
from liftc.passes.fold_decode_transform import FoldDecodeTransform
from liftc.passes.fuse_row_groups import FuseRowGroups
from liftc.passes.lower_linears import LowerLinears
from liftc.passes.plan_layout import PlanLayout
from liftc.passes.registry import get_pass
from liftc.passes.select_linears import SelectLinears
from liftc.passes.share_transforms import ShareTransforms


def before_quantize(
    default: LiftFormat,
    overrides: Mapping[str, LiftFormat] | None = None,
    *,
    include: str | None = None,
    exclude: str | None = None,
) -> list[Pass]:
    """Passes that decide what the quantizer does; the graphs stay runnable in plain torch.

    default: format of every linear. overrides: regular expression on the linear's name -> format.
    include, exclude: regular expressions that widen or narrow the selection.
    """
    return [
        # One spelling per computation, so that q, k and v visibly read the same activation.
        Canonicalize(),
        # Which layers are lowered: everything in the decoder blocks, unless the user says otherwise.
        SelectLinears(include=include or "", exclude=exclude or ""),
        # How many bits each of them gets; before sharing, for only equal formats can share a lift.
        AssignFormats(
            format=str(default),
            overrides=tuple(f"{pattern}={fmt}" for pattern, fmt in (overrides or {}).items()),
        ),
        # Linears that read one activation in one format share its lift.
        ShareTransforms(),
    ]


def after_quantize(*, activation_scale: bool = False) -> list[Pass]:
    """Passes that turn the selected linears into lift ops and freeze what is stored.

    activation_scale: the quantizer gave every lift a scale of its input channels.
    """
    return [
        # Each selected linear becomes lift + sign_matmul; dense weights leave the program.
        LowerLinears(activation_scale=activation_scale),
        # One sign_matmul for all linears of a lift: fewer, larger kernels.
        FuseRowGroups(),
        # The fused factor of the transform depends on weights alone: computed once, at load.
        FoldDecodeTransform(),
        # Many tokens at once are cheaper with the weight decoded first (paper, appendix D).
        ChooseOrder(),
        # Nothing may add or drop a stored byte after this.
        PlanLayout(),
    ]


_NAME = re.compile(r"\s*([a-z][a-z0-9-]*)\s*")
_KEY = re.compile(r"\s*([a-z][a-z0-9-]*)=")
_BARE = re.compile(r"[^,{}\"\s]+")
_SEPARATOR = re.compile(r"\s*,\s*|\s+(?=[^}])|\s*(?=\})")


def parse_pipeline(text: str) -> list[Pass]:
    """Passes written as `assign-formats{bits=2.4},lower-linears`; values with special characters are quoted.

    Empty text is the empty pipeline.
    Raises PassError naming the position of what it cannot read.
    """
    passes: list[Pass] = []
    at = 0
    while text.strip():
        match = _NAME.match(text, at)
        if not match:
            raise PassError(f"pipeline, character {at + 1}: expected the name of a pass")
        at = match.end()
        options: list[tuple[str, str]] = []
        if text.startswith("{", at):
            options, at = _options(text, at + 1)
        passes.append(get_pass(match[1]).from_options(options))
        rest = text[at:].lstrip()
        if not rest:
            return passes
        if rest[0] != ",":
            raise PassError(
                f"pipeline, character {at + 1}: expected ',' and another pass, found {rest[:12]!r}"
            )
        at = text.index(",", at) + 1
    return passes


def _options(text: str, at: int) -> tuple[list[tuple[str, str]], int]:
    options: list[tuple[str, str]] = []
    while not text.startswith("}", at):
        key = _KEY.match(text, at)
        if not key:
            raise PassError(f"pipeline, character {at + 1}: expected option=value or '}}'")
        at = key.end()
        value, at = _value(text, at)
        options.append((key[1], value))
        separator = _SEPARATOR.match(text, at)
        if not separator:
            raise PassError(f"pipeline, character {at + 1}: expected ',' or '}}'")
        at = separator.end()
    return options, at + 1


def _value(text: str, at: int) -> tuple[str, int]:
    if text.startswith('"', at):
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
            return str(value), end
        except json.JSONDecodeError as error:
            raise PassError(f"pipeline, character {at + 1}: the string does not end") from error
    match = _BARE.match(text, at)
    if not match:
        raise PassError(f"pipeline, character {at + 1}: expected a value")
    return match[0], match.end()
