"""Encode blocks of weights as signs: the nearest point of the codebook {M b} by a beam search.

min over b in {-1,+1}^D of ||A (w - M b)||^2 is integer least squares with fewer equations than unknowns.
Since ||b||^2 = D whatever b is, adding lam ||b||^2 changes nothing but makes the system triangular (the
generalised sphere decoder of MIMO detection):

    G = M'A'A M + lam I = R'R,  targets = R^-T M'A'A w,  min over b of ||targets - R b||^2

and the tree of signs can be searched from the last one up, keeping the `beam` cheapest prefixes. The
residual of row i is read from tables indexed by four signs at a time, so a prefix is its packed signs and
its cost, nothing else. Every back end performs the float32 operations of `search_reference` in its order,
so all of them return the same signs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from liftc.errors import QuantizeError
from liftc.format import MAX_LIFTED_DIM

MAX_BEAM = 4096
DEFAULT_BEAM = 64
DEFAULT_LAM = 0.05

SIGNS_PER_LOOKUP = 4
SIGNS_PER_GROUP = 16
"""Signs whose four table entries are summed before they are subtracted from the residual."""

_LARGEST_TARGET = 1e15
_SMALLEST_METRIC = 1e-6


@dataclass(frozen=True)
class Prepared:
    """One mapping matrix under one metric, ready to encode; made by `prepare`.

    mapping_matrix (d, D), projection (d, D) with targets = w @ projection, diagonal (D,) of R, and table
    (D, ceil(D/16), 4, 16): table[i, h, q, v] = sum of R[i, j] b_j over the signs j = 16 h + 4 q + bit, j > i,
    where bit `bit` of v is 1 for b_j = +1. All float32 on one device.
    """

    mapping_matrix: torch.Tensor
    projection: torch.Tensor
    diagonal: torch.Tensor
    table: torch.Tensor

    @property
    def lifted_dim(self) -> int:
        return self.mapping_matrix.shape[1]

    @property
    def subspace_dim(self) -> int:
        return self.mapping_matrix.shape[0]

    @property
    def device(self) -> torch.device:
        return self.mapping_matrix.device


def prepare(
    mapping_matrix: torch.Tensor, metric: torch.Tensor | None = None, lam: float = DEFAULT_LAM
) -> Prepared:
    """Factorise M (d, D) under the metric A (d, d), or the identity, on M's device.

    The metric is divided by the root mean square of its column norms, so that the mean diagonal entry of A'A
    is 1 and `lam` (in units of squared weights of unit variance) means the same for every metric. Computed
    in float64, stored in float32. Raises QuantizeError for a matrix that is not (d, D) with
    1 <= d <= D <= 256 and finite, lam <= 0, or a metric of the wrong shape, not finite or (nearly) singular.
    """
    return prepare_many(mapping_matrix, None if metric is None else metric[None], lam)[0]


def prepare_many(mapping_matrix: torch.Tensor, metrics: torch.Tensor | None, lam: float) -> list[Prepared]:
    """`prepare` for each metric of (n, d, d), or once for the identity, together on M's device."""
    _check_mapping(mapping_matrix)
    if not (math.isfinite(lam) and lam > 0):
        raise QuantizeError(f"encode: lam must be a positive number, got {lam}")
    d, big = mapping_matrix.shape
    device = mapping_matrix.device
    exact = mapping_matrix.detach().double()
    weighted = exact[None] if metrics is None else _grams(metrics.to(device), d) @ exact
    gram = exact.T @ weighted + lam * torch.eye(big, dtype=torch.float64, device=device)
    factor = torch.linalg.cholesky(gram, upper=True)
    projection = torch.linalg.solve_triangular(factor.mT, weighted.mT, upper=False).mT
    groups = -(-big // SIGNS_PER_GROUP)
    strict = factor.new_zeros(len(factor), big, groups * SIGNS_PER_GROUP)
    strict[:, :, :big] = factor.triu(1)
    values = torch.arange(2**SIGNS_PER_LOOKUP, device=device)
    patterns = ((values[:, None] >> torch.arange(SIGNS_PER_LOOKUP, device=device)) & 1).double() * 2 - 1
    tables = (strict.view(len(factor), big, groups, -1, SIGNS_PER_LOOKUP) @ patterns.T).float()
    diagonals = factor.diagonal(dim1=-2, dim2=-1).float().contiguous()
    matrix, projections = exact.float(), projection.float().contiguous()
    return [Prepared(matrix, *parts) for parts in zip(projections, diagonals, tables)]


def encode(
    w: torch.Tensor,
    mapping_matrix: torch.Tensor,
    *,
    beam: int = DEFAULT_BEAM,
    metric: torch.Tensor | None = None,
    lam: float = DEFAULT_LAM,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Signs int8 (B, D) that nearly minimise ||A (w - M b)||^2 for each row of w (B, d); see `prepare`.

    Runs on `device`, by default where w is; the signs are returned on w's device. Deterministic: exact ties
    go to the prefix that comes first. Raises QuantizeError as `prepare` and `encode_prepared` do.
    """
    run_on = torch.device(device) if device is not None else w.device
    prepared = prepare(mapping_matrix.to(run_on), metric, lam)
    return encode_prepared(w, prepared, beam).to(w.device)


def encode_prepared(w: torch.Tensor, prepared: Prepared, beam: int = DEFAULT_BEAM) -> torch.Tensor:
    """Signs int8 (B, D) on prepared's device for w (B, d); an empty batch gives (0, D).

    Raises QuantizeError when w has the wrong shape or is not finite, when beam is not in 1..4096, or when
    the compiled back end of the device is not available.
    """
    return search(project(w, prepared, beam), prepared, beam)[0]


def project(w: torch.Tensor, prepared: Prepared, beam: int = 1) -> torch.Tensor:
    """Search targets float32 (B, D) of w (B, d): w @ projection, after the checks of `encode_prepared`."""
    if not 1 <= beam <= MAX_BEAM:
        raise QuantizeError(f"encode: beam must lie between 1 and {MAX_BEAM}, got {beam}")
    if w.ndim != 2 or w.shape[1] != prepared.subspace_dim:
        raise QuantizeError(
            f"encode: weights of shape {tuple(w.shape)} do not split into rows of d = {prepared.subspace_dim}"
        )
    blocks = w.to(prepared.device, torch.float32)
    if not bool(torch.isfinite(blocks).all()):
        raise QuantizeError("encode: the weights contain NaN or infinity; repair the checkpoint first")
    targets = blocks @ prepared.projection
    if targets.numel() and not bool(targets.abs().max() < _LARGEST_TARGET):
        raise QuantizeError("encode: the weights are too large; divide them by their scale before encoding")
    return targets


def search(targets: torch.Tensor, prepared: Prepared, beam: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search with the compiled back end of the device: signs int8 (B, D) and cost float32 (B,).

    The cost is ||targets - R b||^2, which is the squared error under the metric plus a constant per row.
    """
    if prepared.device.type == "cuda":
        from liftc.quant.beam_cuda import search_cuda

        return search_cuda(targets, prepared, beam)
    if prepared.device.type == "cpu":
        from liftc.quant.beam_llvm import search_llvm

        return search_llvm(targets, prepared, beam)
    raise QuantizeError(f"encode: there is no encoder for device {prepared.device}; use cpu or cuda")


def search_reference(
    targets: torch.Tensor, prepared: Prepared, beam: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same search in plain torch, any device: the oracle of the compiled back ends.

    Children are ordered +1 children first, then -1 children, each in the order of their parents; ties go to
    the first, and survivors keep this order. cost + e^2 is one fused multiply-add.
    """
    rows, big = targets.shape
    table, diagonal, groups = prepared.table, prepared.diagonal, prepared.table.shape[1]
    cost = targets.new_zeros(rows, 1)
    packed = torch.zeros(rows, 1, groups, dtype=torch.int64, device=targets.device)
    for i in range(big - 1, -1, -1):
        n = cost.shape[1]
        residual = targets[:, i : i + 1].expand(rows, n)
        for h in range((i + 1) // SIGNS_PER_GROUP, groups):
            t0, t1, t2, t3 = (table[i, h, q][(packed[:, :, h] >> (4 * q)) & 15] for q in range(4))
            residual = residual - ((t0 + t1) + (t2 + t3))
        plus, minus = (residual - diagonal[i]).double(), (residual + diagonal[i]).double()
        children = torch.cat([plus * plus + cost.double(), minus * minus + cost.double()], 1).float()
        keep = 1 if i == 0 else min(2 * n, beam)
        pick = children.sort(dim=1, stable=True).indices[:, :keep].sort(dim=1).values
        cost = children.gather(1, pick)
        packed = packed.gather(1, (pick % n)[:, :, None].expand(-1, -1, groups))
        packed[:, :, i // SIGNS_PER_GROUP] |= (pick < n).long() << (i % SIGNS_PER_GROUP)
    bits = (packed[:, 0, :, None] >> torch.arange(SIGNS_PER_GROUP, device=targets.device)) & 1
    return (bits.reshape(rows, -1)[:, :big] * 2 - 1).to(torch.int8), cost[:, 0]


def decode(signs: torch.Tensor, mapping_matrix: torch.Tensor) -> torch.Tensor:
    """Weights M b float32 (B, d) of signs (B, D), M (d, D). Raises QuantizeError when the widths differ."""
    if signs.ndim != 2 or mapping_matrix.ndim != 2 or signs.shape[1] != mapping_matrix.shape[1]:
        raise QuantizeError(
            f"decode: signs of shape {tuple(signs.shape)} do not fit a mapping matrix of shape "
            f"{tuple(mapping_matrix.shape)}"
        )
    return signs.to(mapping_matrix.device, torch.float32) @ mapping_matrix.float().T


def _check_mapping(mapping_matrix: torch.Tensor) -> None:
    if mapping_matrix.ndim != 2:
        raise QuantizeError(f"encode: a mapping matrix is (d, D), got shape {tuple(mapping_matrix.shape)}")
    d, big = mapping_matrix.shape
    if not 1 <= d <= big <= MAX_LIFTED_DIM:
        raise QuantizeError(
            f"encode: a mapping matrix of shape ({d}, {big}) needs 1 <= d <= D <= {MAX_LIFTED_DIM}"
        )
    if not bool(torch.isfinite(mapping_matrix).all()):
        raise QuantizeError("encode: the mapping matrix contains NaN or infinity")


def _grams(metrics: torch.Tensor, d: int) -> torch.Tensor:
    """A'A (n, d, d) float64 of each metric, scaled to a mean diagonal of 1."""
    if tuple(metrics.shape[1:]) != (d, d):
        raise QuantizeError(
            f"encode: the metric must be ({d}, {d}) like d, got shape {tuple(metrics.shape[1:])}"
        )
    exact = metrics.detach().double()
    if not bool(torch.isfinite(exact).all()):
        raise QuantizeError("encode: the metric contains NaN or infinity; add damping to the input gram")
    sizes = torch.linalg.svdvals(exact)
    if not bool((sizes[:, -1] > _SMALLEST_METRIC * sizes[:, 0]).all()):
        raise QuantizeError("encode: the metric is not positive definite; add damping to the input gram")
    exact = exact / exact.square().sum((1, 2), keepdim=True).div(d).sqrt()
    return exact.mT @ exact
