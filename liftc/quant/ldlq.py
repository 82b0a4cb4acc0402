"""Block LDLQ: quantize one group of linears that share an input, block by block, with error feedback.

With H' the damped input gram in whitened coordinates and H'⁻¹ = Uᵀ U (U upper triangular), block k of d
columns is encoded in the metric A = U_kk⁻ᵀ (AᵀA is the Schur complement: the error that remains after the
later blocks compensate), and its error is fed to the later columns: W -= E U_kk⁻¹ U_k,later.

With an output metric G, for the error tr(G E H Eᵀ), rows compensate rows in the same way: G⁻¹ = Vᵀ V, and the error
of a block of rows moves the targets of the rows after it by -(V_rr⁻¹ V_r,later)ᵀ E. Only errors of the same columns
are needed for that, so columns stay the outer loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from liftc.errors import QuantizeError
from liftc.packing import pack_signs
from liftc.quant.encode import encode_prepared, prepare_many
from liftc.quant.parallel import Ranks
from liftc.quant.whitening import Whitening, damped
from liftc.spec import LiftSpec

ROW_BLOCKS = 8
"""Blocks of rows that are encoded one after the other under an output metric."""
OUTPUT_DAMP = 0.1
"""Damping of an output metric, which few tokens estimate."""
BLOCKS_AT_ONCE = 64
"""Blocks whose search tables are made together and held at once."""


@dataclass(frozen=True)
class GroupResult:
    """Outcome for the stacked rows of one group.

    packed: int32 (ceil(OC / 32), lifted_features). output_scale: bfloat16 (OC,). weight: float32, the dense
    weight the signs stand for, of the rows this process encoded: all (OC, IC) unless several share them.
    relative_error: ||W - Ŵ||² / ||W||². proxy_loss: the same in the metric of the input gram,
    tr(E H Eᵀ) / tr(W H Wᵀ).
    """

    packed: torch.Tensor
    output_scale: torch.Tensor
    weight: torch.Tensor
    relative_error: float
    proxy_loss: float


@torch.no_grad()
def quantize_group(
    weight: torch.Tensor,
    gram: torch.Tensor,
    spec: LiftSpec,
    whitening: Whitening,
    mapping_matrix: torch.Tensor,
    *,
    beam: int,
    damp: float,
    lam: float,
    device: torch.device | None = None,
    ranks: Ranks | None = None,
    output_metric: torch.Tensor | None = None,
) -> GroupResult:
    """Quantize weight (OC, IC) against gram (IC, IC) = E[x xᵀ]; both any float dtype.

    output_metric: G (OC, OC), how errors of the outputs count together; the identity if not given.

    Works on `device` (default: where the weight is), with the processes of `ranks` each encoding a part of the
    rows; results are on the CPU. Raises QuantizeError for NaN or
    infinite weights. Rows of zeros get output_scale 0.
    """
    place = device or weight.device
    ranks = ranks or Ranks()
    ours = ranks.rows(len(weight))
    weight = weight[ours]
    weight, gram, mapping_matrix = weight.to(place, torch.float32), gram.to(place), mapping_matrix.to(place)
    whitening = whitening.to(place)
    if not torch.isfinite(weight).all():
        raise QuantizeError("the weights hold NaN or infinite values; repair the checkpoint first")
    d, lifted = spec.format.subspace_dim, spec.format.lifted_dim
    white = whitening.whiten_weight(weight)
    moved = torch.zeros_like(white)  # by the feedback of earlier columns
    factor = feedback_factor(whitening.whiten_gram(gram.double()), damp)
    row_blocks = _row_feedback(
        len(white), None if output_metric is None else output_metric[ours, ours].to(place)
    )
    scale = white.pow(2).mean(1).sqrt().to(torch.bfloat16)
    rows = scale.float()[:, None]
    safe = torch.where(rows > 0, rows, torch.ones_like(rows))
    packed = torch.empty(-(-white.shape[0] // 32), spec.lifted_features, dtype=torch.int32, device=place)
    decoded = torch.zeros_like(white)
    inverses = torch.linalg.inv(diagonal_blocks(factor, d))
    for first in range(0, len(inverses), BLOCKS_AT_ONCE):
        prepared = prepare_many(mapping_matrix, inverses[first : first + BLOCKS_AT_ONCE].mT, lam)
        for index, search in enumerate(prepared, first):
            start, stop = index * d, (index + 1) * d
            target, wanted = white[:, start:stop].clone(), moved[:, start:stop]
            found: list[torch.Tensor] = []
            for block, feedback in row_blocks:
                wanted[block] += target[block]
                signs = encode_prepared(wanted[block] / safe[block], search, beam)
                decoded[block, start:stop] = (signs.float() @ mapping_matrix.T) * rows[block]
                found.append(signs)
                if block.stop < len(white):
                    target[block.stop :] -= feedback @ (target[block] - decoded[block, start:stop])
            packed[:, index * lifted : (index + 1) * lifted] = pack_signs(torch.cat(found))
            if stop < white.shape[1]:
                onwards = (inverses[index] @ factor[start:stop, stop:]).float()
                moved[:, stop:] -= (wanted - decoded[:, start:stop]) @ onwards
    dense = whitening.unwhiten_weight(decoded, weight.shape[1])
    packed, scale = ranks.concatenate(packed), ranks.concatenate(scale)
    sums = ranks.sum(_error_sums(weight, dense, gram)).tolist()
    relative, proxy = (error / energy if energy > 0 else 0.0 for error, energy in (sums[:2], sums[2:]))
    return GroupResult(packed.cpu(), scale.cpu(), dense.cpu(), relative, proxy)


def _row_feedback(count: int, metric: torch.Tensor | None) -> list[tuple[slice, torch.Tensor]]:
    """(rows, how their error moves the targets of all later rows) for each block of rows, in order."""
    if metric is None:
        return [(slice(0, count), torch.empty(0, count))]
    factor = feedback_factor(metric.double(), OUTPUT_DAMP)
    step = -(-count // ROW_BLOCKS // 32) * 32
    found = []
    for start in range(0, count, step):
        block = slice(start, min(start + step, count))
        onwards = torch.linalg.solve(factor[block, block], factor[block, block.stop :])
        found.append((block, onwards.T.float().contiguous()))
    return found


def diagonal_blocks(factor: torch.Tensor, size: int) -> torch.Tensor:
    """The blocks (n / size, size, size) on the diagonal of an (n, n) matrix."""
    count = factor.shape[0] // size
    return torch.stack([factor[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])


def feedback_factor(whitened_gram: torch.Tensor, damp: float) -> torch.Tensor:
    """U (n, n) float64, upper triangular, with Uᵀ U the inverse of the damped gram.

    Damping grows tenfold at a time when the gram is too ill-conditioned for float64.
    """
    for attempt in range(5):
        gram = damped(whitened_gram, damp * 10**attempt)
        lower, info = torch.linalg.cholesky_ex(gram)
        del gram
        if info.item() == 0:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper: torch.Tensor
            upper, info = torch.linalg.cholesky_ex(inverse.add(inverse.T).div_(2), upper=True)
            del inverse
            if info.item() == 0 and bool(torch.isfinite(upper).all()):
                return upper
    raise QuantizeError("the input gram is not positive definite even when damped; use more calibration text")


def _error_sums(weight: torch.Tensor, dense: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """||E||², ||W||², tr(E H Eᵀ), tr(W H Wᵀ) of the error E = W - Ŵ, float64 (4,)."""
    error, exact, metric = (weight - dense).double(), weight.double(), gram.double()
    return torch.stack([
        error.square().sum(), exact.square().sum(), ((error @ metric) * error).sum(),
        ((exact @ metric) * exact).sum(),
    ])  # fmt: skip
