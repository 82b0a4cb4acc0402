"""Updates that keep a mapping matrix inside a structure, for benchmarks/mapping_variants.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

RIDGE = 1e-4
Update = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def structure(kind: str, d: int, big: int, device: str) -> tuple[Update, torch.Tensor]:
    """(least-squares update from E[b b'] and E[w b'], start) of a structure; float64, (d, D).

    cyclic:Q / signed:Q: the columns are shifts by multiples of Q weights of D Q / d generators (a signed
    shift flips what wraps around). band:W: entries further than W weights from the diagonal are zero.
    mix: two diagonal blocks times a fixed orthogonal (D, D). kron: (d/2, D/2) times (2, 2), nearest in norm.
    """
    noise = torch.randn(d, big, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distance = torch.arange(d)[:, None] - torch.arange(big)[None] * (d / big)
    plain = noise * torch.exp(-((distance / min(8.0, d / 4)) ** 2))
    plain = (plain / plain.norm(dim=1, keepdim=True)).to(device)
    eye = RIDGE * torch.eye(big, dtype=torch.float64, device=device)

    def free(c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        solution: torch.Tensor = torch.linalg.solve(c + eye, x.T).T
        return solution

    name, _, argument = kind.partition(":")
    if name == "free":
        return free, plain
    if name == "kron":
        return (lambda c, x: nearest_kron(free(c, x))), nearest_kron(plain)
    if name in ("band", "mix"):
        if name == "band":
            mask = distance.abs() <= float(argument)
            turn = torch.eye(big, dtype=torch.float64)
        else:
            half = torch.arange(big) >= big // 2
            mask = (torch.arange(d) >= d // 2)[:, None] == half[None]
            turn = torch.linalg.qr(
                torch.randn(big, big, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            )[0]
        kept, turn = mask.to(device, torch.float64), turn.to(device)

        def masked(c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            c, x = turn @ (c + eye) @ turn.T, x @ turn.T
            systems = kept[:, :, None] * c * kept[:, None, :] + torch.diag_embed(1 - kept)
            solution: torch.Tensor = torch.linalg.solve(systems, kept * x) @ turn
            return solution

        return masked, (plain @ turn.T * kept) @ turn if name == "band" else kept * plain @ turn
    return tied(int(argument), name == "signed", d, big, device, eye)


def tied(
    step: int, signed: bool, d: int, big: int, device: str, eye: torch.Tensor
) -> tuple[Update, torch.Tensor]:
    """Normal equations restricted to generators under cyclic shifts by multiples of `step` weights."""
    shifts = d // step
    of = torch.arange(big) * shifts // big
    first = torch.tensor([int((of == s).nonzero()[0]) for s in range(shifts)])
    generator = torch.arange(big) - first[of]
    row = torch.arange(d)[:, None] - (of * step)[None]
    sign = torch.where(row < 0, -1.0 if signed else 1.0, 1.0).double()
    index = generator[None] * d + row % d
    count = (int(generator.max()) + 1) * d
    place = torch.zeros(d, big, count, dtype=torch.float64)
    place.scatter_(2, index[:, :, None], sign[:, :, None])
    place = place.to(device)
    away = torch.arange(count) % d
    window = torch.exp(-((torch.minimum(away, d - away) / min(8.0, d / 4)) ** 2))
    values = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * window
    start = place @ values.to(device)

    def update(c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        half = (c + eye) @ place
        system = place.reshape(-1, count).T @ half.reshape(-1, count)
        right = place.reshape(-1, count).T @ x.reshape(-1)
        solution: torch.Tensor = place @ torch.linalg.solve(system, right)
        return solution

    return update, start / start.norm(dim=1).mean()


def nearest_kron(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest product of (d/2, D/2) and (2, 2) matrices in the Frobenius norm; an odd D keeps its last column."""
    d, big = matrix.shape[0], matrix.shape[1] // 2 * 2
    blocks = matrix[:, :big].reshape(d // 2, 2, big // 2, 2).permute(0, 2, 1, 3).reshape(-1, 4)
    u, s, v = torch.linalg.svd(blocks, full_matrices=False)
    product = (s[0] * u[:, :1] @ v[:1]).reshape(d // 2, big // 2, 2, 2).permute(0, 2, 1, 3).reshape(d, big)
    return torch.cat([product, matrix[:, big:]], 1)
