"""Low-rank updates and scalings of a linear layer, with autograd functions of their own.

On a plain linear layer (`site.plain`) the base product is computed inside the kernel: the update is added in
place, the two input gradients are one accumulated product, and only what the gradients need is saved for
backward. On any other (quantised, under a second part, with a trained base weight), and with dropout, the
same formula runs on the original call `base` with ordinary autograd. Trained tensors stay in fp32 and are
cast in each call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftzoo.contract import Site
from peftzoo.kernels.forward_cache import ForwardCache


def low_rank(
    site: Site,
    base: Callable,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: nn.Module | None = None,
) -> Tensor:
    """x W^T + b + scale (drop(x) A^T) B^T. x (..., in), A (r, in), B (out, r) -> (..., out)."""
    if not active(dropout) and fusable(site, x):
        return _Affine.apply(cast(x), site.weight, site.bias, A, B, scale, None, None)
    return base(x) + _branch(x, A, B, scale, dropout)


def scaled_low_rank(
    site: Site,
    base: Callable,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    g: Tensor,
    dropout: nn.Module | None = None,
) -> Tensor:
    """g * (x W^T + scale (x A^T) B^T) + b, g (out,).

    With dropout: x W^T + (g - 1) * drop(x) W^T + g * scale (drop(x) A^T) B^T + b, one mask for both terms.
    """
    b = site.bias
    if not active(dropout) and fusable(site, x):
        return _Affine.apply(cast(x), site.weight, None, A, B, scale, g, b)
    y = base(x)
    if active(dropout):
        x = dropout(x)
    z = base(x) if active(dropout) else y
    z = z if b is None else z - b
    return y + ((g - 1) * z + g * _branch(x, A, B, scale)).to(y.dtype)


def scaled(site: Site, base: Callable, x: Tensor, g: Tensor, c: Tensor | None = None) -> Tensor:
    """g * (x W^T + b) + c, with scale g and shift c (out,). x (..., in) -> (..., out)."""
    if fusable(site, x):
        return _Affine.apply(cast(x), site.weight, site.bias, None, None, 1.0, g, c)
    y = base(x)
    return (g * y if c is None else torch.addcmul(c, g, y)).to(y.dtype)


def scaled_input(site: Site, base: Callable, x: Tensor, g: Tensor) -> Tensor:
    """(g * x) W^T + b, with g (in,). x (..., in) -> (..., out)."""
    if fusable(site, x):
        return _ScaledInput.apply(cast(x), site.weight, site.bias, g)
    return base((g * x).to(x.dtype))


def frozen_pair(
    site: Site,
    base: Callable,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    u: Tensor,
    v: Tensor,
    recent: ForwardCache,
    dropout: nn.Module | None = None,
) -> Tensor:
    """x W^T + b + v * ((u * (drop(x) A^T)) B^T), A (r, in) and B (out, r) frozen, u (r,), v (out,).

    Layers that read the same x with the same A take the product x A^T from `recent`, where the first one
    leaves it.
    """
    if active(dropout) or not fusable(site, x):
        y, H = base(x), branch_input(x, A, dropout)
        return y + (v * F.linear((u * H).to(H.dtype), B.to(H.dtype))).to(y.dtype)
    X = cast(x)
    which = None if torch.compiler.is_compiling() else A.data_ptr()  # other groups of layers have another A
    if _merging_pays(X):
        P = None
        if _need_grad(u, v):
            P = recent.get(x, (X.dtype, A.shape, which), lambda: F.linear(X.detach(), A.to(X.dtype)))
        return _MergedPair.apply(X, site.weight, site.bias, P, A, B, u, v)
    P = recent.get(x, (X.dtype, A.shape, which, "graph"), lambda: _FrozenProduct.apply(X, A, recent))
    return _FrozenPair.apply(X, site.weight, site.bias, P, B, u, v)


# -- when and in which precision ------------------------------------------------------------------------


def active(dropout: nn.Module | None) -> bool:
    """Whether the dropout changes its input: it is there, in train mode, and p > 0."""
    return dropout is not None and dropout.training and dropout.p > 0


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the base layer would multiply."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast(x: Tensor) -> Tensor:
    """x in the dtype in which the base layer would multiply: autocast's, where that is on."""
    return x.to(_compute_dtype(x))


def fusable(site: Site, x: Tensor) -> bool:
    """Whether the kernel may compute the base product: a frozen plain layer, in the dtype it would use."""
    if not site.plain:
        return False
    W, b = site.module.weight, site.bias
    frozen = not W.requires_grad and (b is None or not b.requires_grad)
    return frozen and (x.dtype == W.dtype or torch.is_autocast_enabled(x.device.type))


def branch_input(x: Tensor, A: Tensor, dropout: nn.Module | None) -> Tensor:
    """drop(x) A^T, (..., in) -> (..., r)."""
    x = dropout(x) if active(dropout) else x
    x = cast(x)
    return F.linear(x, A.to(x.dtype))


def _branch(x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: nn.Module | None = None) -> Tensor:
    """scale (drop(x) A^T) B^T, (..., in) -> (..., out)."""
    H = branch_input(x, A, dropout)
    return F.linear(H, (scale * B).to(H.dtype))


def _need_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _merging_pays(X: Tensor) -> bool:
    """Whether W + diag(v) B diag(u) A, built for one call, costs less than the branch, in time and memory.

    For n tokens it saves `in` numbers per output, not n; r in out products replace about r n (out + in).
    Never in half precision, where adding to W would round the change away.
    """
    n, in_ = X.numel() // X.shape[-1], X.shape[-1]
    return X.dtype in (torch.float32, torch.float64) and 4 * n >= 3 * in_


def rows(B: Tensor, like: Tensor) -> Tensor:
    """B^T (r, out) in the dtype of `like`; its rows are contiguous on a CPU, where that is faster."""
    Bt = B.T.to(like.dtype)
    return Bt if Bt.is_cuda else Bt.contiguous()


# -- the kernels ----------------------------------------------------------------------------------------


class _Affine(torch.autograd.Function):
    """y = g * (x W^T + b + s (x A^T) B^T) + c; the pair A, B, the scale g and the shift c are optional.

    Saved for backward: x and s x A^T for the pair; for g the output itself, from which the bracket z is y / g
    (with a shift, or in fp16: z).
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B, s, g, c):
        z = F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))  # (..., out)
        H = None
        if A is not None:
            H = torch.mm(x.reshape(-1, x.shape[-1]), A.T.to(x.dtype)).mul_(s)  # (n, r)
            z.view(-1, z.shape[-1]).addmm_(H, rows(B, x))
        y = z
        if g is not None:
            ctx.saves_z = c is not None or z.dtype == torch.float16  # z cannot be computed from y as y / g
            g = g + 1e-30  # y / g needs g != 0; any other scale stays what it is
            y = torch.mul(z, g).to(z.dtype) if ctx.saves_z else z.mul_(g)
            y = y if c is None else y.add_(c)
        ctx.s, ctx.shape = s, x.shape
        ctx.save_for_backward(None if A is None else x, W, A, B, H, g, None if g is None else z, c)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B, H, g, z, c = ctx.saved_tensors
        D = dy.reshape(-1, dy.shape[-1])  # (n, out)
        dX = dA = dB = dg = dc = None
        if ctx.needs_input_grad[7]:
            dc = D.sum(0, dtype=c.dtype)
        if g is not None:
            D, dg = _through_scale(D, z.view_as(D), g)
            dg = dg if ctx.saves_z else dg / g
        if ctx.needs_input_grad[0]:
            dX = torch.mm(D, W.to(D.dtype))  # (n, in)
        if A is not None:
            dH = torch.mm(D, rows(B, D).T).mul_(ctx.s)  # (n, r)
            dA = torch.mm(dH.T, x.reshape(-1, x.shape[-1])).to(A.dtype)
            dB = torch.mm(H.T, D).T.to(B.dtype)
            dX = dX if dX is None else dX.addmm_(dH, A.to(D.dtype))
        dX = dX if dX is None else dX.view(ctx.shape)
        return dX, None, None, dA, dB, None, dg, dc


def _through_scale(D: Tensor, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of g * z for z, (n, out), and for g, (out,), with one temporary tensor."""
    T = D * z
    dg = T.sum(0, dtype=g.dtype)
    return torch.mul(D, g, out=T), dg


class _ScaledInput(torch.autograd.Function):
    """y = (g * x) W^T + b"""

    @staticmethod
    def forward(ctx, x, W, b, g):
        ctx.save_for_backward(x, W, g)
        return F.linear((x * g).to(x.dtype), W.to(x.dtype), None if b is None else b.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, W, g = ctx.saved_tensors
        D = torch.mm(dy.reshape(-1, dy.shape[-1]), W.to(dy.dtype)).view(x.shape)
        dg = (D * x).flatten(0, -2).sum(0, dtype=g.dtype)
        return D.mul_(g) if ctx.needs_input_grad[0] else None, None, None, dg


class _FrozenProduct(torch.autograd.Function):
    """P = x A^T with A frozen. Saves no tensor, so backward through a shared P may run more than once."""

    @staticmethod
    def forward(ctx, x, A, cache):
        ctx.A, ctx.cache = A, cache
        return F.linear(x, A.to(x.dtype))

    @staticmethod
    def backward(ctx, dP):
        ctx.cache.clear()  # the shared product belongs to one forward pass
        return torch.matmul(dP, ctx.A.to(dP.dtype)), None, None


class _FrozenPair(torch.autograd.Function):
    """y = x W^T + b + v * Z, Z = (u * P) B^T, B frozen.

    With N = (v * dy) B:  dP = u * N,  du = sum_t P * N,  dv = sum_t dy * Z. Saved: P, which is shared, and Z.
    """

    @staticmethod
    def forward(ctx, x, W, b, P, B, u, v):
        y = F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))
        Z = F.linear(P, (B * u).to(x.dtype))  # (..., out)
        ctx.save_for_backward(W, P, B, u, v, Z)
        return y.addcmul_(Z, v.to(y.dtype))

    @staticmethod
    def backward(ctx, dy):
        W, P, B, u, v, Z = ctx.saved_tensors
        D = dy.reshape(-1, dy.shape[-1])  # (n, out)
        dx = torch.mm(D, W.to(D.dtype)).view(*dy.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        dv = (D * Z.view_as(D)).sum(0, dtype=v.dtype)
        N = torch.mm(D, (v[:, None] * B).to(D.dtype)).view_as(P)  # (..., r)
        du = (N * P).flatten(0, -2).sum(0, dtype=u.dtype)
        dP = N.mul_(u) if ctx.needs_input_grad[3] else None
        return dx, None, None, dP, None, du, dv


class _MergedPair(torch.autograd.Function):
    """y = x V^T + b, V = W + diag(v) B diag(u) A built for this call; P = x A^T serves the gradients.

    With M = dy^T P (out, r):  dv_i = sum_k u_k B_ik M_ik,  du_k = sum_i v_i B_ik M_ik. Saved: P and V.
    """

    @staticmethod
    def forward(ctx, x, W, b, P, A, B, u, v):
        V = torch.addmm(W.to(x.dtype), (v[:, None] * B).to(x.dtype), (u[:, None] * A).to(x.dtype))
        ctx.save_for_backward(P, B, u, v, V)
        return F.linear(x, V, None if b is None else b.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        P, B, u, v, V = ctx.saved_tensors
        D = dy.reshape(-1, dy.shape[-1])  # (n, out)
        dx = torch.mm(D, V).view(*dy.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        M = torch.mm(D.T, P.reshape(-1, P.shape[-1])).to(u.dtype).mul_(B)  # (out, r), times B
        return dx, None, None, None, None, None, v @ M, M @ u
