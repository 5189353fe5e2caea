"""WeGeFT (first named GIFT): the frozen weight generates its own change through two thin shared maps.

    input side:   W' = W (I + s phi^T psi)    y = (x + s (x psi^T) phi) W^T + b          phi, psi (r, in)
    output side:  W' = (I + s phi^T psi) W    y = h + s (h psi^T) phi, h = x W^T + b      phi, psi (r, out)

One pair for all layers of a role (`tied`), or one per layer. s = alpha / r. psi ~ U(-1/sqrt(d), 1/sqrt(d)),
phi = 0. The older form (`gift`) has s = 1 and starts with psi = 0, phi random; its optional non-linear
blocks are left out. The output side edits b too. Trained: 2 r d per pair (Llama-2-7B, r = 64 at q, k, v, up,
down: 3,506,176, whatever the depth).
Paper: Savadikar, Song and Wu, arXiv 2312.00700. Its code computes W phi^T at every step. Different: the
input is edited instead, so W is only ever multiplied once, and may be quantised. With `weight_dropout`,
which the paper applies to W inside the change, W phi^T is computed as there. r = 64 in the published runs,
here 16 with the same s.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import cast, fusable, low_rank


class _EditedInput(torch.autograd.Function):
    """y = (x + s (x psi^T) phi) W^T + b. Saved for backward: x and H = s x psi^T (T, r)."""

    @staticmethod
    def forward(ctx, x, W, b, phi, psi, s):
        X = x.reshape(-1, x.shape[-1])  # (T, in)
        H = torch.mm(X, psi.T.to(x.dtype)).mul_(s)
        Z = torch.addmm(X, H, phi.to(x.dtype)).view_as(x)
        ctx.s = s
        ctx.save_for_backward(x, W, phi, psi, H)
        return F.linear(Z, W.to(x.dtype), None if b is None else b.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, W, phi, psi, H = ctx.saved_tensors
        dZ = torch.mm(dy.reshape(-1, dy.shape[-1]), W.to(dy.dtype))  # (T, in)
        dphi = torch.mm(H.T, dZ).to(phi.dtype)
        dH = torch.mm(dZ, phi.T.to(dZ.dtype)).mul_(ctx.s)
        dpsi = torch.mm(dH.T, x.reshape(-1, x.shape[-1])).to(psi.dtype)
        dx = dZ.addmm_(dH, psi.to(dZ.dtype)).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, None, None, dphi, dpsi, None


class WeGeFTPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c = owner.config
        self.s = 1.0 if c.form == "gift" else c.alpha / c.r
        self.inward = c.side == "input"
        self.dropout = nn.Dropout(c.weight_dropout)

    def pair(self) -> tuple[Tensor, Tensor]:
        """phi and psi of this layer's group, (r, d)."""
        i = self.owner.number[self.site.name]
        return self.owner.phi[i], self.owner.psi[i]

    def edit(self, t: Tensor) -> Tensor:
        """t (I + s psi^T phi), (..., d)."""
        (phi, psi), u = self.pair(), cast(t)
        return t + F.linear(F.linear(u, psi.to(u.dtype)), (self.s * phi).T.to(u.dtype)).to(t.dtype)

    def delta(self, W: Tensor) -> Tensor:
        phi, psi = self.pair()
        return self.s * ((W @ phi.T) @ psi if self.inward else phi.T @ (psi @ W))

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.inward else self.edit(b)

    def forward(self, base, x: Tensor) -> Tensor:
        if not self.inward:
            return self.edit(base(x))
        phi, psi = self.pair()
        if self.dropout.p and self.training:
            W = self.dropout(self.site.weight.to(phi.dtype))
            return low_rank(self.site, base, x, psi, W @ phi.T, self.s)
        if fusable(self.site, x):
            return _EditedInput.apply(cast(x), self.site.weight, self.site.bias, phi, psi, self.s)
        return base(self.edit(x))


class WeGeFT(Adapter):
    name = "wegeft"
    title = "Weight-Generative Fine-Tuning"
    paper = "Savadikar, Song and Wu, WeGeFT, arXiv 2312.00700 (ICML 2025)"
    family = "shared"
    count_formula = (
        "(not tied) * 2 * r * (in if side == 'input' else out); "
        "roles: tied * 2 * r * (in if side == 'input' else out)"
    )
    lr = 3e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(16, ge=1, description="rank")
        alpha: float = Field(32.0, gt=0, description="scale numerator, s = alpha/r; not used by gift")
        side: Literal["input", "output"] = Field("input", description="which side of W the change stands on")
        tied: bool = Field(True, description="one pair for all layers of a role, or one per layer")
        form: Literal["wegeft", "gift"] = Field("wegeft", description="gift: s = 1, psi starts at zero")
        weight_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on W inside the change")

        @model_validator(mode="after")
        def _dropout_needs_the_input_side(self):
            if self.weight_dropout and self.side == "output":
                raise ValueError("weight_dropout is for side=input")
            return self

    def prepare(self, sites: list[Site]) -> None:
        c, side = self.config, int(self.config.side == "input")
        groups = [(s.role if c.tied else s.name, s.shape[side]) for s in sites]
        names = list(dict.fromkeys(groups))
        self.number = {s.name: names.index(g) for s, g in zip(sites, groups, strict=True)}
        zero = [torch.zeros(c.r, d) for _, d in names]
        drawn = [self.ctx.uniform(c.r, d, bound=d**-0.5, key=f"{name}/{d}") for name, d in names]
        self.phi, self.psi = map(nn.ParameterList, (drawn, zero) if c.form == "gift" else (zero, drawn))

    def part(self, site: Site) -> Part:
        return WeGeFTPart(site, self)
