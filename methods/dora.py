"""DoRA: a magnitude per output times the direction of W + s B A.

    V = W + s B A        y = x V^T * g + b        g = m / |V|_row        A (r, in), B (out, r), m (out,)

The norm |V|_row (out,) is a constant for the gradient (section 4.3), taken in closed form, without V:
    |V_i|^2 = |W_i|^2 + 2 s B_i (A W_i^T) + s^2 B_i (A A^T) B_i^T
A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, m = |W|_row: the identity. Trained: r (in + out) + out per layer.
The bias is not scaled. Merged: W' = diag(g) V.
Paper: Liu et al., arXiv 2402.09353. Different: |W_i|^2 is kept, so the norms cost one (out, in) by (in, r)
product per call and no dense (out, in) matrix; V is never formed while training.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import scaled_low_rank


class DoRAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_) = owner.config, site.shape
        self.A = nn.Parameter(owner.ctx.uniform(c.r, in_, bound=in_**-0.5, key=site.name))
        self.B = nn.Parameter(torch.zeros(out, c.r))
        norm = site.weight.detach().float().norm(dim=1)
        self.m = nn.Parameter(norm.clone())
        self.register_buffer("W2", norm.square(), persistent=False)  # |W_i|^2 (out,)
        self.scale = c.alpha / c.r
        self.dropout = nn.Dropout(c.dropout)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """|W + s B A|_row, (out,)"""
        A, B, W, s = self.A, self.B, self.site.weight, self.scale
        M = torch.mm(W, A.T.to(W.dtype)).float()  # (out, r)
        return (self.W2 + (B * (2 * s * M + s * s * (B @ (A @ A.T)))).sum(1)).clamp_min(1e-12).sqrt()

    def delta(self, W: Tensor) -> Tensor:
        V = W + self.scale * self.B @ self.A
        return (self.m / V.detach().norm(dim=1))[:, None] * V - W

    def forward(self, base, x: Tensor) -> Tensor:
        g = self.m / self.norm()
        return scaled_low_rank(self.site, base, x, self.A, self.B, self.scale, g, self.dropout)


class DoRA(Adapter):
    name = "dora"
    title = "Weight-Decomposed Low-Rank Adaptation"
    paper = "Liu et al., DoRA, arXiv 2402.09353 (ICML 2024)"
    family = "low-rank"
    count_formula = "r * (in + out) + out"
    peft = "LoraConfig"
    peft_names: ClassVar[dict] = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    lr = 3e-3
    known_failures: ClassVar = {"check_gradient_of_tensors": "the norm is a constant for the gradient"}

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=1, description="rank")
        alpha: float = Field(16.0, gt=0, description="scale numerator, s = alpha/r")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the low-rank and rescaled input")

    def part(self, site: Site) -> Part:
        return DoRAPart(site, self)

    def peft_config(self, sites: list[Site]) -> dict:
        return super().peft_config(sites) | {"use_dora": True}

    def peft_state(self) -> dict[str, Tensor]:
        state = {}
        for p in self.parts.values():
            state[f"{p.site.name}.lora_A.default.weight"] = p.A
            state[f"{p.site.name}.lora_B.default.weight"] = p.B
            state[f"{p.site.name}.lora_magnitude_vector.default.weight"] = p.m
        return state
