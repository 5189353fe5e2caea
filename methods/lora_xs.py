"""LoRA-XS: a trained r x r matrix between the frozen top singular factors of the weight.

    W = U S V^T        y = x W^T + b + s * ((drop(x) A^T) R^T) B^T     A = S_r V_r^T (r, in), B = U_r (out, r)

R (r, r) ~ N(0, 1e-10), so the start is the base up to 1e-5; s = alpha / r. Trained: r^2 per layer, whatever
its width (Mistral-7B, all seven, r = 64: 917,504). W is not changed. The factors are not saved: they are
taken from W again, with fixed signs, when an adapter is loaded.

Paper: Balazy et al., arXiv 2405.17604. Different: an exact SVD for small layers and a seeded randomised one
for large layers, where the code always takes a randomised one; backward keeps x A^T (n, r), not x.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import check_rank, frozen_core, rows_first, top_svd


class LoRAXSPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, ctx = owner.config, owner.ctx
        check_rank(site, c.r)
        U, S, Vt = top_svd(site.weight, c.r, ctx, site.name)
        self.register_buffer("A", S[:, None] * Vt, persistent=False)
        self.register_buffer("B", rows_first(U), persistent=False)
        self.R = nn.Parameter(ctx.normal(c.r, c.r, std=c.std, key=site.name))
        self.scale = c.alpha / c.r
        self.dropout = nn.Dropout(c.dropout)

    def delta(self, W: Tensor) -> Tensor:
        return self.scale * self.B @ self.R @ self.A

    def forward(self, base, x: Tensor) -> Tensor:
        return frozen_core(self.site, base, x, self.A, self.B, self.scale * self.R, self.dropout)


class LoRAXS(Adapter):
    name = "lora-xs"
    title = "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters"
    paper = "Balazy et al., LoRA-XS, arXiv 2405.17604 (ECAI 2025)"
    family = "low-rank"
    count_formula = "r ** 2"
    lr = 2e-2
    identity_at_init = False

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(16, ge=1, description="rank of the frozen factors; r^2 numbers are trained per layer")
        alpha: float = Field(16.0, gt=0, description="scale numerator, s = alpha/r")
        std: float = Field(1e-5, gt=0, description="standard deviation of R at the start")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    tiny: ClassVar = {"r": 6}

    def part(self, site: Site) -> Part:
        return LoRAXSPart(site, self)
