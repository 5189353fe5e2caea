"""Block-diagonal rotations: made from skew-symmetric matrices, and applied to activations block by block."""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(Q: Tensor) -> Tensor:
    """R = (I - Q) (I + Q)^-1, orthogonal for skew-symmetric Q (..., c, c): the Cayley transform."""
    E = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype)
    return torch.linalg.solve(E + Q, E - Q)  # the two factors commute


def neumann(Q: Tensor, terms: int) -> Tensor:
    """R = I + 2 Q + 2 Q^2 + ... + Q^(terms - 1): the Neumann series of (I + Q) (I - Q)^-1, (..., c, c).

    The last term counts once, not twice; `terms` is at least 3.
    """
    P = Q
    R = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype) + 2 * Q
    for _ in range(terms - 3):
        P = P @ Q
        R = R + 2 * P
    return R + P @ Q


def rotate_blocks(x: Tensor, R: Tensor) -> Tensor:
    """x blockdiag(R): block j of x (..., k c) times R[j], R (k, c, c); one R (1, c, c) serves all blocks."""
    k, c, _ = R.shape
    R = R.to(x.dtype)
    X = x.unflatten(-1, (-1, c))  # (..., k, c)
    Y = X @ R[0] if k == 1 else torch.einsum("...kc,kcd->...kd", X, R)
    return Y.flatten(-2)
