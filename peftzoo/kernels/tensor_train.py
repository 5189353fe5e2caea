"""A matrix as a chain of small trained tensors (a tensor train).

    M[i, j] = G_1[:, n_1, :] G_2[:, n_2, :] ... G_d[:, n_d, :]    (n_1, ..., n_d) the digits of i columns + j

G_k (R, n, R), the outer ranks 1: every row-major digit over the shape's factors picks a matrix of one core.
Trained: sum_k R_(k-1) n_k R_k. Cores ~ N(0, 1) / sqrt(R_k) * sigma^(1/d), so that an entry of M has standard
deviation sigma = 1 / sqrt(rows + columns).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from peftzoo.contract import Context
from peftzoo.kernels.rebuilt_weights import exact

WIDEST = 12
"""Largest factor of a width that is not in the table, unless it has a larger prime factor."""

PUBLISHED = {
    (768, 8): (8, 8, 12, 8), (1024, 8): (4, 8, 8, 8, 4), (2304, 8): (8, 8, 8, 4, 9),
    (4096, 8): (16, 16, 8, 4, 4), (5120, 8): (8, 8, 10, 8, 8), (768, 64): (8, 8, 12, 8, 8),
    (1024, 64): (4, 8, 8, 8, 8, 4), (4096, 64): (16, 16, 16, 4, 4, 4), (5120, 64): (5, 8, 8, 16, 8, 8),
}  # fmt: skip
"""(width, bottleneck) -> factors of their product, from the LoRETTA paper."""


def factors(n: int) -> list[int]:
    """n as a product: the largest divisors up to `WIDEST` first, then the rest."""
    if n == 1:
        return []
    k = next((k for k in range(min(WIDEST, n), 1, -1) if n % k == 0), None)
    k = k or next(k for k in range(WIDEST, n + 1) if n % k == 0)
    return [k, *factors(n // k)]


def shape_of(width: int, bottleneck: int) -> tuple[int, ...]:
    """Factors of width x bottleneck: the published ones, else those of the width, then of the bottleneck."""
    return PUBLISHED.get((width, bottleneck)) or (*factors(width), *factors(bottleneck)) or (1,)


class TensorTrain(nn.Module):
    """The trained cores of a matrix of `size` (rows, columns), whose factors are `shape`, with inner ranks R.

    Raises `ValueError` when the product of `shape` is not rows * columns.
    """

    def __init__(self, ctx: Context, key: str, size: tuple[int, int], shape: tuple[int, ...], R: int) -> None:
        super().__init__()
        if math.prod(shape) != math.prod(size):
            raise ValueError(f"{shape} is not a factorisation of {size[0]} x {size[1]}")
        self.size, sigma = size, sum(size) ** -0.5
        ranks = [1, *[R] * (len(shape) - 1), 1]
        cores = []
        for i, n in enumerate(shape):
            std = ranks[i + 1] ** -0.5 * sigma ** (1 / len(shape))
            cores.append(ctx.normal(ranks[i], n, ranks[i + 1], std=std, key=f"{key}/{i}"))
        self.cores = nn.ParameterList(cores)

    def matrix(self) -> Tensor:
        """M (rows, columns)."""
        first, *rest = self.cores
        M = first.flatten(0, 1)  # (n_1, R)
        with exact(M):
            for G in rest:
                M = (M @ G.flatten(1)).view(-1, G.shape[-1])  # (n_1 ... n_k, R)
        return M.view(self.size)
