"""MoRA: one square matrix at LoRA's budget, with fixed ways to compress the input and to spread the output.

    y = x W^T + b + spread(M compress(drop(x)))       M (R, R), R = floor(sqrt(r (in + out)) + 1/2)

    sharing (type 1):   compress(x)[i] = sum_k x[k R + i];  spread(z)[j] = z[j mod R]
    rotation (type 6):  block k of x, R wide, is turned by k 10000^(-2 j / R) on the pairs (j, j + R/2),
                        multiplied by M and put back; cut to out, or repeated where out is wider; R even

Where R does not divide in, x goes on with its own first features, as in the official code (the paper does
not say). R is at most min(in, out) here; a wider one has idle or doubled rows. M = 0: the start is the base.
Trained: R^2 per layer, about r (in + out) (Llama-2-7B, r = 8, type 1: 20,014,592).
Paper: Jiang et al., arXiv 2405.12130: rotation for small r, sharing for large. Its other groupings (types
2-4) and merge-and-restart for pre-training are left out. Different: M is turned once per block, not every
token; kept for backward is compress(x) (T, R), or x. There is no alpha / r, as there.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import cast, in_place


def fold(t: Tensor, R: int) -> Tensor:
    """(T, d) -> (T, R): the sum of the blocks of R columns, the last as far as it goes."""
    whole = t.shape[1] // R * R
    z = t[:, :whole].reshape(len(t), -1, R).sum(1)
    z[:, : t.shape[1] - whole] += t[:, whole:]
    return z


def tile(z: Tensor, d: int) -> Tensor:
    """(T, R) -> (T, d), repeated and cut: the transpose of `fold`."""
    return z.repeat(1, -(-d // z.shape[1]))[:, :d]


def unwrap(dX: Tensor, d: int) -> Tensor:
    """Gradient of columns that go on with the first ones, (T, n R) -> of the d columns there are."""
    dx = dX[:, :d]
    dx[:, : dX.shape[1] - d] += dX[:, d:]
    return dx


def turned(M: Tensor, n: int, back: bool = False) -> Tensor:
    """M (R, R) times the rotation of each of n blocks, (n, R, R); `back`: N (n, R, R) times its transpose."""
    k, j = (torch.arange(i, device=M.device, dtype=M.dtype) for i in (n, M.shape[-1] // 2))
    angle = k[:, None, None] * 10000.0 ** (-2 * j / M.shape[-1])
    c, s = angle.cos(), angle.sin() * (-1 if back else 1)
    P, Q = M.chunk(2, dim=-1)
    return torch.cat([P * c + Q * s, Q * c - P * s], dim=-1)


class _Shared(torch.autograd.Function):
    """x (..., in) -> tile(M fold(x)) (..., out). Saved for backward: M and fold(x)."""

    @staticmethod
    def forward(ctx, x, M, out):
        X, R = x.reshape(-1, x.shape[-1]), len(M)
        C, rest = fold(X, R), X.shape[1] % R
        if rest:
            C[:, rest:] += X[:, : R - rest]
        ctx.shape = x.shape
        ctx.save_for_backward(C, M)
        return tile(torch.mm(C, M.T.to(x.dtype)), out).view(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx, dy):
        (C, M), in_ = ctx.saved_tensors, ctx.shape[-1]
        dZ = fold(dy.reshape(-1, dy.shape[-1]), len(M))
        dM, dx = torch.mm(dZ.T, C).to(M.dtype), None
        if ctx.needs_input_grad[0]:
            dC = torch.mm(dZ, M.to(dZ.dtype))
            dx = unwrap(dC.repeat(1, -(-in_ // len(M))), in_).view(ctx.shape)
        return dx, dM, None


class _Turned(torch.autograd.Function):
    """x (..., in) -> M R_k x_k for the blocks k, side by side, (..., out). Saved for backward: M and x."""

    @staticmethod
    def cut(x: Tensor, R: int) -> Tensor:
        """(..., n R) -> (n, T, R), after going on with the first columns."""
        X = x.reshape(-1, x.shape[-1])
        X = torch.cat([X, X[:, : -X.shape[1] % R]], dim=1) if X.shape[1] % R else X
        return X.view(len(X), -1, R).transpose(0, 1)

    @staticmethod
    def forward(ctx, x, M, out):
        ctx.save_for_backward(x, M)
        V = _Turned.cut(x, len(M))
        Z = torch.bmm(V, turned(M, len(V)).to(x.dtype).mT).transpose(0, 1).flatten(1)  # (T, n R)
        return tile(Z, out).view(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx, dy):
        x, M = ctx.saved_tensors
        V, D = _Turned.cut(x, len(M)), dy.reshape(-1, dy.shape[-1])
        n, T, R = V.shape
        dZ = fold(F.pad(D, (0, max(0, n * R - D.shape[1]))), n * R).view(T, n, R).transpose(0, 1)
        dM = turned(torch.bmm(dZ.mT, V).to(M.dtype), n, back=True).sum(0)
        dV = torch.bmm(dZ, turned(M, n).to(dZ.dtype)).transpose(0, 1).flatten(1)
        return unwrap(dV, x.shape[-1]).view(x.shape), dM, None


class MoRAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_) = owner.config, site.shape
        R = min(math.floor(math.sqrt(c.r * (in_ + out)) + 0.5), in_, out)
        self.rotation = c.type == "rotation"
        R -= R % 2 if self.rotation else 0
        self.M = nn.Parameter(torch.zeros(R, R))
        self.dropout = nn.Dropout(c.dropout)

    def delta(self, W: Tensor) -> Tensor:
        (out, in_), M, R = self.site.shape, self.M, len(self.M)
        n = -(-in_ // R)
        wide = torch.block_diag(*turned(M, n)) if self.rotation else M.repeat(1, n)
        return tile(unwrap(wide.clone(), in_).T, out).T

    def forward(self, base, x: Tensor) -> Tensor:
        move = _Turned if self.rotation else _Shared
        return in_place(self.site, base(x), move.apply(cast(self.dropout(x)), self.M, self.site.shape[0]))


class MoRA(Adapter):
    name = "mora"
    title = "High-Rank Updating"
    paper = "Jiang et al., MoRA: High-Rank Updating for PEFT, arXiv 2405.12130"
    family = "structured"
    count_formula = (
        "(min(((r * (in + out)) ** 0.5 + 0.5) // 1, in, out)"
        " // (1 + (type == 'rotation')) * (1 + (type == 'rotation'))) ** 2"
    )
    lr = 3e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=1, description="rank of the LoRA with as many trained numbers")
        type: Literal["rotation", "sharing"] = Field("rotation", description="type 6 or type 1 of the paper")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    tiny: ClassVar = {"r": 2}

    def part(self, site: Site) -> Part:
        return MoRAPart(site, self)
