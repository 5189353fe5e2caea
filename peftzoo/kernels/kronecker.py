"""A layer plus a Kronecker product, applied as small products and never formed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftzoo.contract import Site
from peftzoo.kernels.lowrank import cast
from peftzoo.kernels.rebuilt_weights import in_place, recomputed


def plus_kron(site: Site, base: Callable, x: Tensor, s: float, A: Tensor, B: Tensor, *C: Tensor) -> Tensor:
    """base(x) + s * x kron(A, B)^T, or kron(A, B C) with a third factor C.

    Saved for backward: x and the factors.
    """
    return in_place(site, base(x), s * recomputed(apply_kron, cast(x), A, B, *C))


def apply_kron(x: Tensor, A: Tensor, B: Tensor, C: Tensor | None = None) -> Tensor:
    """x kron(A, B C)^T as rows of A U B^T with U = X C^T, where x is X (m, c) row by row.

    A (o, m), B (p, k), C (k, c), or k = c and U = X: (..., m c) -> (..., o p). Of A (U B^T) and (A U) B^T the
    one with fewer products is taken.
    """
    (o, m), (p, k) = A.shape, B.shape
    A, B = A.to(x.dtype), B.to(x.dtype)
    U = x.reshape(-1, m, x.shape[-1] // m)  # (n, m, c)
    if C is not None:
        U = U @ C.to(x.dtype).T  # (n, m, k)
    if m * p * (k + o) < o * k * (m + p):
        Y = torch.einsum("om,nmp->nop", A, U @ B.T)
    else:
        Y = torch.einsum("om,nmk->nok", A, U) @ B.T
    return Y.reshape(*x.shape[:-1], o * p)
