"""A small trained core between two frozen factors: nothing as wide as the layer is saved for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftzoo.contract import Site
from peftzoo.kernels.lowrank import active, branch_input, cast, fusable, rows


def frozen_core(
    site: Site,
    base: Callable,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dropout: nn.Module | None = None,
) -> Tensor:
    """x W^T + b + m(drop(x) A^T) B^T, A (r, in) and B (out, r) frozen.

    The trained core C is a matrix (r, r) with m(h) = h C^T, or a vector (r,) with m(h) = C * h.
    x (..., in) -> (..., out).
    """
    if not active(dropout) and fusable(site, x):
        return _FrozenCore.apply(cast(x), site.weight, site.bias, A, B, C)
    H = branch_input(x, A, dropout)
    return base(x) + F.linear(_apply_core(H, C), B.to(H.dtype))


def rows_first(B: Tensor) -> Tensor:
    """B, stored so that its transpose is contiguous, which makes products with B^T faster on a CPU."""
    return B.T.contiguous().T


def _apply_core(H: Tensor, C: Tensor) -> Tensor:
    C = C.to(H.dtype)
    return H * C if C.ndim == 1 else F.linear(H, C)


class _FrozenCore(torch.autograd.Function):
    """With H = x A^T, N = dy B:  dC = N^T H, or its diagonal;  dx = dy W + m^T(N) A. Saved: H (n, r)."""

    @staticmethod
    def forward(ctx, x, W, b, A, B, C):
        y = F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))
        H = torch.mm(x.reshape(-1, x.shape[-1]), A.T.to(x.dtype))  # (n, r)
        y.view(-1, y.shape[-1]).addmm_(_apply_core(H, C), rows(B, x))
        ctx.save_for_backward(W, A, B, C, H)
        return y

    @staticmethod
    def backward(ctx, dy):
        W, A, B, C, H = ctx.saved_tensors
        D = dy.reshape(-1, dy.shape[-1])  # (n, out)
        N = torch.mm(D, B.to(D.dtype))  # (n, r)
        dC = (N * H).sum(0, dtype=C.dtype) if C.ndim == 1 else torch.mm(N.T, H).to(C.dtype)
        dX = None
        if ctx.needs_input_grad[0]:
            dX = torch.mm(D, W.to(D.dtype))  # (n, in)
            dX = dX.addmm_(_apply_core(N, C if C.ndim == 1 else C.T), A.to(D.dtype)).view(*dy.shape[:-1], -1)
        return dX, None, None, None, None, dC
