"""Factors of a weight that methods start from or freeze: truncated SVD, QR, QR with column pivoting.

Signs are fixed, so that the same weight gives the same factors on every machine. On the meta device only
shapes come back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftzoo.contract import Context, Site
from peftzoo.errors import UserError

EXACT = 512
"""A matrix whose smaller side is at most this gets an exact SVD, a larger one a randomised SVD."""


def check_rank(site: Site, r: int) -> None:
    """Raises `UserError` when the layer's weight has fewer than `r` singular directions."""
    if r > (largest := min(site.shape)):
        raise UserError(
            f"r={r} exceeds the {largest} directions of {site.name}: lower r or choose other targets"
        )


@torch.no_grad()
def top_svd(M: Tensor, r: int, ctx: Context, key: str, iterations: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets of M (out, in): U (out, r), S (r,), V^T (r, in), in fp32.

    Large matrices go through a random sketch with `iterations` rounds of subspace iteration (Halko et al.,
    arXiv 0909.4061). The entry of largest size in each column of U is positive.
    """
    out, in_ = M.shape
    if ctx.meta:
        return tuple(torch.empty(s, device="meta") for s in ((out, r), (r,), (r, in_)))
    M = M.detach().float()
    if min(out, in_) <= EXACT:
        U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    else:
        q = min(r + 10, out, in_)
        Q = torch.linalg.qr(M @ ctx.normal(in_, q, std=1.0, key=f"{key}/sketch").to(M.device)).Q
        for _ in range(iterations):
            Q = torch.linalg.qr(M @ torch.linalg.qr(M.T @ Q).Q).Q  # (out, q)
        U, S, Vt = torch.linalg.svd(Q.T @ M, full_matrices=False)
        U = Q @ U
    U, S, Vt = U[:, :r], S[:r], Vt[:r]
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # (1, r)
    return U * sign, S, Vt * sign.T


@torch.no_grad()
def top_qr(M: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """First r columns of Q and rows of R in M = Q R, M (out, in): (out, r) and (r, in), in fp32, diag R >= 0.

    Only the first r columns of M need a QR; the other columns of R are Q^T M.
    """
    if M.is_meta:
        return tuple(torch.empty(s, device="meta") for s in ((M.shape[0], r), (r, M.shape[1])))
    M = M.detach().float()
    Q, R = torch.linalg.qr(M[:, :r])
    Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    R = Q.T @ M
    R[:, :r] = R[:, :r].triu()
    return Q, R


@torch.no_grad()
def pivoted_qr(M: Tensor, r: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """QR with column pivoting: M P = Q T with T_11 >= T_22 >= ... >= 0, in fp32.

    Returns the first r of the k = min(out, in) columns of Q (out, r), rows of R = T P^T (r, in) and entries
    of diag T (r,). All k (r None) come from LAPACK; r of them take r products with M on its device.
    """
    if M.is_meta:
        r = r or min(M.shape)
        return tuple(torch.empty(s, device="meta") for s in ((len(M), r), (r, M.shape[1]), (r,)))
    M = M.detach().float()
    return _lapack_pivots(M) if r is None else _greedy_pivots(M, r)


def _lapack_pivots(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All k pivots, by LAPACK's geqp3 on the CPU."""
    from scipy.linalg import qr

    Q, T, order = qr(M.cpu().numpy(), mode="economic", pivoting=True, check_finite=False)
    Q, T = torch.from_numpy(Q.copy()), torch.from_numpy(T.copy())
    sign = torch.where(T.diagonal() < 0, -1.0, 1.0)
    R = torch.empty_like(T)
    R[:, torch.from_numpy(order).long()] = T * sign[:, None]
    return tuple(t.to(M.device) for t in (Q * sign, R, T.diagonal() * sign))


def _greedy_pivots(M: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first r pivots, one after the other, by Gram-Schmidt on M's device."""
    (out, in_), residual = M.shape, M.square().sum(0)  # squared norm of what remains of each column
    Q, R, T = M.new_zeros(out, r), M.new_zeros(r, in_), M.new_zeros(r)
    for i in range(r):
        pivot = residual.argmax()
        q = M[:, pivot]
        for _ in range(2):  # the second time against rounding errors
            q = q - Q[:, :i] @ (Q[:, :i].T @ q)
        T[i] = q.norm()
        Q[:, i] = q / T[i]
        R[i] = Q[:, i] @ M
        residual = residual - R[i].square()
        residual[pivot] = -torch.inf
    return Q, R, T
