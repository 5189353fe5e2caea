"""Fixed projections of one short trained vector onto many parameters: theta (d,) -> P theta (D,).

`balanced` and `local` assign an entry of theta to each of the D numbers. `Fastfood` and `Gaussian` mix all
of theta into each: the first is never stored and takes D log d operations, the second is stored, for small
models; both preserve the norm on average. A dense projection saves nothing for backward, so backward may run
through its graph repeatedly.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftzoo.contract import Context
from peftzoo.errors import UserError
from peftzoo.kernels.rebuilt_weights import exact

LARGEST = 2**28
"""Largest number of entries of a stored P."""


def balanced(ctx: Context, D: int, d: int, key: str = "") -> Tensor:
    """Indices (D,) into theta: 0..d-1 in random order, each floor(D/d) or ceil(D/d) times."""
    extra = ctx.shuffled(torch.arange(d), key=f"{key}extra")[: D % d]
    return ctx.shuffled(torch.cat([torch.arange(d).repeat(D // d), extra]), key=f"{key}idx")


def local(ctx: Context, sizes: dict[str, int], d: int) -> Tensor:
    """Indices (D,) into theta: `balanced` per layer, from a slice of 0..d-1 in proportion to its size.

    `sizes` maps each layer to its number of parameters. Raises `UserError` when d is too small for that.
    """
    idx, offset, D = [], 0, sum(sizes.values())
    for name, n in sizes.items():
        start, end = d * offset // D, d * (offset + n) // D
        if start == end:
            raise UserError(f"d={d} leaves nothing for {name} when every layer has a share: raise d")
        idx.append(start + balanced(ctx, n, end - start, f"{name}/"))
        offset += n
    return torch.cat(idx)


class _ApplyMap(torch.autograd.Function):
    """P theta, with P^T in backward."""

    @staticmethod
    def forward(ctx, theta, map):
        ctx.map = map
        return map.spread(theta)

    @staticmethod
    def backward(ctx, grad):
        with exact(grad):
            return ctx.map.gather(grad), None


class Map(nn.Module):
    """A dense projection: `spread` multiplies by P, (d,) -> (D,), and `gather` by P^T, (D,) -> (d,)."""

    def forward(self, theta: Tensor) -> Tensor:
        """P theta (D,), computed without autocast."""
        with exact(theta):
            return self.spread(theta) if torch.compiler.is_compiling() else _ApplyMap.apply(theta, self)


class Gaussian(Map):
    """P ~ N(0, 1/D), stored. Raises `UserError` when it would have more than `LARGEST` entries."""

    def __init__(self, ctx: Context, D: int, d: int) -> None:
        super().__init__()
        if D * d > LARGEST:
            raise UserError(f"a stored projection of {D} x {d} numbers is too large: lower d or use fastfood")
        self.register_buffer("P", ctx.normal(D, d, std=D**-0.5, key="P"), persistent=False)

    def spread(self, theta: Tensor) -> Tensor:
        """P theta, (d,) -> (D,)."""
        return self.P @ theta

    def gather(self, grad: Tensor) -> Tensor:
        """P^T grad, (D,) -> (d,)."""
        return self.P.T @ grad


class Fastfood(Map):
    """Blocks of N = 2^ceil(log2 d) rows: H diag(g) permutation H diag(s) / (|g| sqrt(D)), cut to D rows.

    H is the Walsh-Hadamard matrix of +1 and -1, s random signs, g ~ N(0, 1), each block with its own; theta
    is padded to N with zeros. Frozen: 3 numbers per row. Le, Sarlos and Smola, arXiv 1408.3060.
    """

    def __init__(self, ctx: Context, D: int, d: int) -> None:
        super().__init__()
        self.D, self.d, self.N = D, d, 1 << (d - 1).bit_length()
        Q = -(-D // self.N)
        sign = ctx.uniform(Q, self.N, bound=1.0, key="sign").sign()
        order = ctx.uniform(Q, self.N, bound=1.0, key="order").argsort(dim=1)
        g = ctx.normal(Q, self.N, std=1.0, key="g")
        g = g / (g.norm(dim=1, keepdim=True) * math.sqrt(D))
        for name, t in (("sign", sign), ("order", order), ("g", g)):
            self.register_buffer(name, t, persistent=False)

    def spread(self, theta: Tensor) -> Tensor:
        """P theta, (d,) -> (D,)."""
        t = hadamard(self.sign * F.pad(theta, (0, self.N - self.d)))  # (Q, N)
        return hadamard(self.g * t.gather(1, self.order)).flatten()[: self.D]

    def gather(self, grad: Tensor) -> Tensor:
        """P^T grad, (D,) -> (d,)."""
        t = self.g * hadamard(F.pad(grad, (0, self.sign.numel() - self.D)).view_as(self.g))
        t = hadamard(torch.zeros_like(t).scatter(1, self.order, t))
        return (self.sign * t).sum(0)[: self.d]


DENSE = {"fastfood": Fastfood, "gaussian": Gaussian}
"""Dense projections by the name that options give them."""


def hadamard(t: Tensor, widest: int = 64) -> Tensor:
    """t H for rows t (Q, N), N a power of 2, by products with Hadamard matrices of at most `widest` rows."""
    (Q, N), remaining = t.shape, t.shape[1]
    while remaining > 1:
        m = min(remaining, widest)
        H = torch.ones(1, 1, dtype=t.dtype, device=t.device)
        while len(H) < m:
            H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
        t = (t.view(Q, N // m, m) @ H).transpose(1, 2).reshape(Q, N)  # the next digits of the index come last
        remaining //= m
    return t
