"""Kernels that build a large tensor from small trained ones, use it once, and recompute it in backward.

Saved for backward are the input and the small tensors. It is built in fp32, with autocast switched off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftzoo.contract import Site
from peftzoo.kernels.lowrank import cast, fusable


def exact(t: Tensor) -> torch.autocast:
    """A context without autocast, on the device of t: small inverses and products of factors need fp32."""
    return torch.autocast(t.device.type, enabled=False)


def in_place(site: Site, y: Tensor, z: Tensor) -> Tensor:
    """y + z for the output y of the original call; y is changed in place where no other code can hold it."""
    z = z.to(y.dtype)
    return y.add_(z) if site.plain else y + z


def recomputed(f: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """f(*tensors), with only `tensors` saved; backward runs f again, so f must not draw random numbers."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        with exact(tensors[0]):
            return f(*tensors)
    return _Recomputed.apply(f, *tensors)


def remade(f: Callable[[Tensor], Tensor], p: nn.Parameter) -> Tensor:
    """f(p) for a trained tensor, recomputed in backward.

    Backward may run through its graph more than once, so that the layers of one forward pass can share the
    value, with gradient checkpointing too.
    """
    with exact(p):
        return f(p) if torch.compiler.is_compiling() else _Remade.apply(f, p)


def rebuilt(
    site: Site,
    base: Callable,
    x: Tensor,
    delta: Callable[..., Tensor],
    *params: Tensor,
    straight: Callable[..., Tensor] | None = None,
) -> Tensor:
    """x (W + delta(W, *params))^T + b, delta (out, in), without saving the dense matrix.

    In full precision W + delta is one matrix and one product. In half precision that would round the change
    away, so the change is multiplied on its own, as it is on a layer that is not plain.
    With `straight`, a straight-through estimate: the gradients of `params` are those of straight(x, *params),
    (..., out), instead.
    """
    X, W = cast(x), site.weight
    if fusable(site, x) and X.dtype in (torch.float32, torch.float64):
        return _rebuilt(X, W, site.bias, lambda W, *p: W + delta(W, *p), straight, params)
    return in_place(site, base(x), _rebuilt(X, W, None, delta, straight, params))


def _rebuilt(
    x: Tensor, W: Tensor, b: Tensor | None, make: Callable, straight: Callable | None, params
) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler has no autograd.grad inside a backward
        V = make(W.float(), *params).to(x.dtype)
        if straight is None:
            return F.linear(x, V, b)
        z = straight(x.detach(), *params)
        return F.linear(x, V.detach(), b) + (z - z.detach())
    return _Rebuilt.apply(x, W, b, make, straight, *params)


class _Remade(torch.autograd.Function):
    """f(p), with p itself saved on the context: not freed by the first backward."""

    @staticmethod
    def forward(ctx, f, p):
        ctx.f, ctx.p = f, p
        return f(p)

    @staticmethod
    def backward(ctx, dy):
        leaf = ctx.p.detach().requires_grad_()
        with torch.enable_grad(), exact(dy):
            return None, torch.autograd.grad(ctx.f(leaf), leaf, dy)[0]


class _Recomputed(torch.autograd.Function):
    """f(*tensors), with f run again in backward."""

    @staticmethod
    def forward(ctx, f, *tensors):
        ctx.f = f
        ctx.save_for_backward(*tensors)
        with exact(tensors[0]):
            return f(*tensors)

    @staticmethod
    def backward(ctx, dy):
        needs_grad = ctx.needs_input_grad[1:]
        leaves = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needs_grad, strict=True)]
        with torch.enable_grad(), exact(dy):
            y = ctx.f(*leaves)
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy))
        return None, *(next(grads) if n else None for n in needs_grad)


class _Rebuilt(torch.autograd.Function):
    """y = x V^T + b, V = make(W, *params):  dx = dy V,  dparams = the gradient of V along dy^T x."""

    @staticmethod
    def forward(ctx, x, W, b, make, straight, *params):
        ctx.make, ctx.straight = make, straight
        ctx.save_for_backward(x, W, *params)
        with exact(x):
            V = make(W.to(params[0].dtype), *params).to(x.dtype)  # (out, in)
            return F.linear(x, V, None if b is None else b.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, W, *params = ctx.saved_tensors
        leaves = [p.detach().requires_grad_() for p in params]
        with exact(x):
            with torch.set_grad_enabled(ctx.straight is None):
                V = ctx.make(W.to(params[0].dtype), *leaves)
            dx = dy.matmul(V.detach().to(dy.dtype)) if ctx.needs_input_grad[0] else None
            if ctx.straight is None:
                G = torch.mm(dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1]))  # (out, in)
                grads = torch.autograd.grad(V, leaves, G.to(V.dtype))
            else:
                with torch.enable_grad():
                    y = ctx.straight(x.detach(), *leaves)
                grads = torch.autograd.grad(y, leaves, dy)
        return dx, None, None, None, None, *grads
