"""LoHa: the elementwise product of two low-rank products, of rank up to r^2.

    y = x W^T + b + s * x ((A1 B1) * (A2 B2))^T        A1, A2 (out, r), B1, B2 (r, in), s = alpha / r

A1, A2 ~ U(-1/sqrt(r), 1/sqrt(r)), B1 ~ U(-1/sqrt(in), 1/sqrt(in)), B2 = 0: the start is the base.
Trained: 2 r (in + out) per layer, so compare r with LoRA of rank 2 r.
Papers: Hyeon-Woo et al., FedPara, arXiv 2108.06098; as an adapter in LyCORIS, Yeh et al., arXiv 2309.14859
(whose own start is normal; the uniform one is HF PEFT's). Different: with L[o, ij] = A1[o, i] A2[o, j]
(out, r^2) and R[ij, n] = B1[i, n] B2[j, n] (r^2, in) the change is s L R, so it is applied as a product of
rank r^2 and never built; backward makes L and R again. Where r^2 is too large for that, the dense change is
built in forward and again in backward.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import cast, fusable, low_rank, rebuilt


def columns(A1: Tensor, A2: Tensor) -> Tensor:
    """L[o, ij] = A1[o, i] A2[o, j], (out, r^2)"""
    return (A1[:, :, None] * A2[:, None, :]).flatten(1)


def rows(B1: Tensor, B2: Tensor) -> Tensor:
    """R[ij, n] = B1[i, n] B2[j, n], (r^2, in)"""
    return (B1[:, None, :] * B2[None, :, :]).flatten(0, 1)


class _Hadamard(torch.autograd.Function):
    """y = x W^T + b + s (x R^T) L^T. Saved for backward: x, the four factors and H = s x R^T (n, r^2)."""

    @staticmethod
    def forward(ctx, x, W, b, A1, B1, A2, B2, s):
        X, R, L = x.reshape(-1, x.shape[-1]), rows(B1, B2).to(x.dtype), columns(A1, A2).to(x.dtype)
        y = F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))  # (..., out)
        H = torch.mm(X, R.T).mul_(s)  # (n, r^2)
        y.view(-1, y.shape[-1]).addmm_(H, L.T)
        ctx.s = s
        ctx.save_for_backward(x, W, A1, B1, A2, B2, H)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, W, A1, B1, A2, B2, H = ctx.saved_tensors
        D, X, r = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), A1.shape[1]
        dH = torch.mm(D, columns(A1, A2).to(D.dtype)).mul_(ctx.s)  # (n, r^2)
        dL = torch.mm(D.T, H).to(A1.dtype).view(-1, r, r)  # (out, r, r)
        dR = torch.mm(dH.T, X).to(A1.dtype).view(r, r, -1)  # (r, r, in)
        dX = None
        if ctx.needs_input_grad[0]:
            dX = torch.mm(D, W.to(D.dtype)).addmm_(dH, rows(B1, B2).to(D.dtype)).view_as(x)
        dA1, dA2 = torch.einsum("oij,oj->oi", dL, A2), torch.einsum("oij,oi->oj", dL, A1)
        dB1, dB2 = torch.einsum("ijn,jn->in", dR, B2), torch.einsum("ijn,in->jn", dR, B1)
        return dX, None, None, dA1, dB1, dA2, dB2, None


class LoHaPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_), draw = owner.config, site.shape, owner.ctx.uniform
        self.A1 = nn.Parameter(draw(out, c.r, bound=c.r**-0.5, key=f"{site.name}/A1"))
        self.B1 = nn.Parameter(draw(c.r, in_, bound=in_**-0.5, key=f"{site.name}/B1"))
        self.A2 = nn.Parameter(draw(out, c.r, bound=c.r**-0.5, key=f"{site.name}/A2"))
        self.B2 = nn.Parameter(torch.zeros(c.r, in_))
        self.s, self.drop = c.alpha / c.r, (c.rank_dropout, c.module_dropout)
        self.dense = c.r**2 * (in_ + out) > in_ * out

    def change(self, W: Tensor, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
        return self.s * (A1 @ B1) * (A2 @ B2)

    def delta(self, W: Tensor) -> Tensor:
        return self.change(W, self.A1, self.B1, self.A2, self.B2)

    def dropped(self) -> Tensor:
        """A1 with rows of the change left out while training, or all of them."""
        rank, module = self.drop
        if not self.training or rank == module == 0:
            return self.A1
        keep = (torch.rand(len(self.A1), 1, device=self.A1.device) >= rank).float()
        return self.A1 * keep / keep.mean().clamp_min(1e-6) * (torch.rand(1, device=keep.device) >= module)

    def forward(self, base, x: Tensor) -> Tensor:
        site, factors = self.site, (self.dropped(), self.B1, self.A2, self.B2)
        if self.dense:
            return rebuilt(site, base, x, self.change, *factors)
        if fusable(site, x):
            return _Hadamard.apply(cast(x), site.weight, site.bias, *factors, self.s)
        A1, B1, A2, B2 = factors
        return low_rank(site, base, x, rows(B1, B2), columns(A1, A2), self.s)


class LoHa(Adapter):
    name = "loha"
    title = "Low-Rank Hadamard Product"
    paper = "Hyeon-Woo et al., FedPara, arXiv 2108.06098 (ICLR 2022); Yeh et al., LyCORIS, arXiv 2309.14859"
    family = "structured"
    count_formula = "2 * r * (in + out)"
    peft = "LoHaConfig"
    lr = 2e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=1, description="rank of each of the two products")
        alpha: float = Field(8.0, gt=0, description="scale numerator, s = alpha/r")
        rank_dropout: float = Field(0.0, ge=0, lt=1, description="share of rows left out in training")
        module_dropout: float = Field(0.0, ge=0, lt=1, description="how often a layer is left out")

    tiny: ClassVar[dict] = {"r": 3, "alpha": 12}
    variants: ClassVar[list] = [{"r": 6, "alpha": 6.0}]

    def part(self, site: Site) -> Part:
        return LoHaPart(site, self)

    def peft_state(self) -> dict[str, Tensor]:
        state = {}
        for p in self.parts.values():
            for ours, theirs in (("A1", "w1_a"), ("B1", "w1_b"), ("A2", "w2_a"), ("B2", "w2_b")):
                state[f"{p.site.name}.hada_{theirs}.default"] = getattr(p, ours)
        return state
