"""Launches of emulated kernels that lift, and what z must be: shared by the tests of both lifts of several tokens."""

from __future__ import annotations

import torch
from emulated_kernels import Emulated

from liftc import reference
from liftc.format import LiftFormat
from liftc.runtime.factors import factor_words
from liftc.spec import transform_shape

EPS = 1e-5


def factors(in_features: int, fmt: LiftFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Random left and right of a lift."""
    g = torch.Generator().manual_seed(in_features)
    t1, t2 = transform_shape(in_features, fmt)
    lifted = t2 // fmt.subspace_dim * fmt.lifted_dim
    return torch.randn(t1, t1, generator=g), torch.randn(t2, lifted, generator=g)


def launch(
    emulated: Emulated, symbol: str, threads: int, groups: int, row_blocks: int, column_blocks: int,
    x: torch.Tensor, in_scale: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, pieces: int = 4,
    gain: torch.Tensor | None = None, columns: int = 0, choice: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Planes, sums of z and z_scale of one launch of `groups` blocks for each part of T* x.

    What nobody writes is 99; planes have room for `columns` (0: as many as are needed).
    """
    (tokens, features), (t2, lifted) = x.shape, right.shape
    scale = torch.ones(1) if in_scale is None else in_scale
    *parts_of, bound = factor_words(left, right)
    words = torch.cat([*(part.flatten() for part in parts_of), scale.view(torch.int32)])
    left_words, right_words, scale_words = words.split([*(t.numel() for t in parts_of), scale.numel()])
    left_words, right_words = left_words.view(parts_of[0].shape), right_words.view(parts_of[1].shape)
    parts = row_blocks * column_blocks
    blocks, columns = -(-left.shape[0] * lifted // 256), columns or 2 * tokens
    planes = torch.full((blocks, pieces, columns, 256 // pieces), 99, dtype=torch.int8)
    totals, z_scale = torch.full((parts, tokens), 99, dtype=torch.int32), torch.full((tokens, 1), 99.0)
    emulated(
        symbol, parts * groups, threads, (x, words),
        x=x, gain=x.new_ones(8) if gain is None else gain, eps=EPS, G=8 if gain is None else len(gain),
        in_scale=scale_words.view(torch.float32), bound=bound, left=left_words, right=right_words, planes=planes,
        totals=totals, z_scale=z_scale, grid=parts * groups, row_blocks=row_blocks, t1=left.shape[0], t2=t2, C=lifted,
        m=tokens, IC=features, XC=features, SC=scale.numel(), NT=left_words.shape[0], KA=left_words.shape[1],
        CT=right_words.shape[0], KJ=right_words.shape[1], KB=blocks, COLS=columns, PIECES=pieces, WIDE=256 // pieces,
        P=parts, choice=choice,
    )  # fmt: skip
    return planes, totals.sum(0, dtype=torch.int32), z_scale


def check(
    z: torch.Tensor, z_scale: torch.Tensor, x: torch.Tensor, in_scale: torch.Tensor | None, left: torch.Tensor,
    right: torch.Tensor,
) -> None:  # fmt: skip
    """z is the rounded T* x, at most a step of the reference away, and the step is that of the reference."""
    want, want_scale = reference.lift(x, in_scale, left, right)
    torch.testing.assert_close(z_scale, want_scale, rtol=1e-5, atol=0, equal_nan=True)
    assert int((z.int() - want.int()).abs().max()) <= 1
    exact = reference.lift_real(
        x.double(), None if in_scale is None else in_scale.double(), left.double(), right.double()
    )
    finite = (z_scale > 0).flatten()
    steps = exact[finite] / z_scale[finite].double()
    assert not finite.any() or float((z[finite] - steps).abs().max()) < 0.75
    assert not z[~finite].any()


def before_lift(
    tokens: int, features: int, form: str, dtype: torch.dtype, generator: torch.Generator, choice: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What a lift behind a norm, a gate or a GELU reads, its gain (and shift), and what separate operations lift.

    Tokens of a LayerNorm are 30 away from 0, at a spread of 1; with choice 1 it is an RMS norm with unit offset.
    """
    paired = form == "gate" or (form == "gelu" and choice < 2)
    given = torch.randn(tokens, features * (1 + paired), generator=generator)
    if form == "gelu":
        given = (given * 2).to(dtype)
        return given, None, gelu_of(given, choice)
    if form == "gate":
        given = given.to(dtype)
        return given, None, torch.nn.functional.silu(given[:, :features]) * given[:, features:]
    gain = (torch.rand(features, generator=generator) + 0.5).to(dtype)
    if form == "layer" and choice == 1:
        given, gain = given.to(dtype), gain - 0.75
        wide = given.double()
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return given, gain, (wide * root * (1 + gain.double())).to(dtype)
    if form == "layer":
        given = (given + 30).to(dtype)
        shift = torch.randn(features, generator=generator).to(dtype)
        return given, torch.cat([gain, shift]), layer_norm_of(given, gain, shift)
    given = given.to(dtype)
    wide = given.float()
    return given, gain, gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(dtype)


def layer_norm_of(x: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """LayerNorm in float64, rounded once."""
    wide = x.double()
    away = wide - wide.mean(-1, keepdim=True)
    root = torch.rsqrt(away.pow(2).mean(-1, keepdim=True) + EPS)
    return (away * root * gain.double() + shift.double()).to(x.dtype)


def gelu_of(x: torch.Tensor, choice: int) -> torch.Tensor:
    """gelu(gate) * up (choice 0 and 1) or gelu(x) (2 and 3) in float64, rounded after each of the two operations."""
    gate, up = x.chunk(2, -1) if choice < 2 else (x, None)
    made = torch.nn.functional.gelu(gate.double(), approximate="tanh" if choice % 2 else "none").to(x.dtype)
    return made if up is None else (made.double() * up.double()).to(x.dtype)


def check_fused(
    z: torch.Tensor, z_scale: torch.Tensor, x: torch.Tensor, in_scale: torch.Tensor | None, left: torch.Tensor,
    right: torch.Tensor,
) -> None:  # fmt: skip
    """z is T* x but where an exp or a root that is one bit off turned a rounding of x, and with it a few steps of z."""
    want, want_scale = reference.lift(x, in_scale, left, right)
    torch.testing.assert_close(z_scale, want_scale, rtol=1e-4, atol=0)
    away = (z.int() - want.int()).abs()
    assert int(away.max()) <= 8 and float((away > 1).float().mean()) < 0.05
