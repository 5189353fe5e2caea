"""DoRA (dynamic rank): LoRA as a sum of gated rank-one parts; the weakest of all layers are pruned.

    y = x W^T + b + s * ((drop(x) A^T) * c) B^T      A (r0, in), B (out, r0), c (r0,), s = alpha / r0

A ~ U(-sqrt(6/in), sqrt(6/in)), B ~ U(-sqrt(6/r0), sqrt(6/r0)), c = 0: only c has a gradient at first.
Trained: r0 (in + out + 1) per layer (RoBERTa-base, all, r = 8: 1,991,520); at the end r of the r0 parts per
layer are left on average. Score of part i, from two (r0, r0) products instead of an (out, in) matrix:
    S_i = |c_i| |B_i| |A_i| / |B diag(c) A|_F        |B diag(c) A|_F^2 = sum_ij c_i c_j (B^T B)_ij (A A^T)_ij
H = beta H + (1 - beta) S after every step. p counts steps since the warm-up, M is the length of the window.
Every `interval` steps from p = 0, and at p = M, the gates of lowest H over all N layers are set to zero,
    k(p) = N (r0 - r) (p / M)^3  of them, at least 1
They may grow again until p = M; then they stay zero. Until then the loss also gets eta times the variance of
the elements of a row of A or a column of B, in the mean over all of them.

Paper: Mao et al., arXiv 2405.17357; k(p) is its code's, the formula as printed would not reach r. Different:
exactly k parts go, ties or not; `interval` is 10, not 100, so that short runs prune too; no dropout (0.1).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import low_rank


class DynamicPart(Part):
    def __init__(self, site: Site, owner: Adapter, r0: int) -> None:
        super().__init__(site, owner)
        c, ctx, (out, in_) = owner.config, owner.ctx, site.shape
        self.A = nn.Parameter(ctx.uniform(r0, in_, bound=(6 / in_) ** 0.5, key=f"{site.name}/A"))
        self.B = nn.Parameter(ctx.uniform(out, r0, bound=(6 / r0) ** 0.5, key=f"{site.name}/B"))
        self.c = nn.Parameter(torch.zeros(r0))
        self.scale = c.alpha / r0
        self.dropout = nn.Dropout(c.dropout)

    def delta(self, W: Tensor) -> Tensor:
        return self.scale * (self.B * self.c) @ self.A

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, self.A, self.B * self.c, self.scale, self.dropout)

    def score(self, eps: float = 1e-8) -> Tensor:
        """Share of each part in the Frobenius norm of the change, (r0,)"""
        P, Q, c = self.B.T @ self.B, self.A @ self.A.T, self.c  # (r0, r0)
        norm = (c @ (P * Q) @ c).clamp_min(0).sqrt()
        return c.abs() * (P.diagonal() * Q.diagonal()).sqrt() / (norm + eps)


class DoRADynamic(Adapter):
    name = "dora-dynamic"
    title = "DoRA with Dynamic Rank Distribution"
    paper = "Mao et al., DoRA, arXiv 2405.17357 (ACL 2024)"
    family = "low-rank"
    count_formula = "(r0 or ceil(1.5 * r)) * (in + out + 1)"
    lr = 3e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=1, description="mean number of parts per layer at the end")
        r0: int | None = Field(None, ge=1, description="parts at the start; by default 1.5 r, rounded up")
        alpha: float = Field(8.0, gt=0, description="scale numerator, s = alpha/r0")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
        beta: float = Field(0.9, ge=0, lt=1, description="decay of the mean score")
        eta: float = Field(0.1, ge=0, description="weight of the variance penalty")
        warmup: float = Field(0.15, ge=0, lt=1, description="share of the steps before any pruning")
        final: float = Field(0.5, ge=0, lt=1, description="share of the steps after the last pruning")
        interval: int = Field(10, ge=1, description="steps from one pruning to the next")

        @model_validator(mode="after")
        def _room(self):
            if self.warmup + self.final >= 1:
                raise ValueError(f"warmup {self.warmup} and final {self.final} leave no steps for pruning")
            if self.r0 is not None and self.r0 < self.r:
                raise ValueError(f"r0={self.r0} is below r={self.r}")
            return self

    def prepare(self, sites: list[Site]) -> None:
        self.r0 = self.config.r0 or math.ceil(1.5 * self.config.r)
        shape = len(sites), self.r0
        self.register_buffer("H", torch.zeros(shape), persistent=False)
        self.register_buffer("gone", torch.zeros(shape, dtype=torch.bool), persistent=False)
        self.register_buffer("penalised", torch.ones(()), persistent=False)

    def part(self, site: Site) -> Part:
        return DynamicPart(site, self, self.r0)

    def penalty(self) -> Tensor:
        variances = [v for p in self.parts.values() for v in (p.A.var(1), p.B.var(0))]
        return self.config.eta * self.penalised * torch.stack(variances).mean()

    def when(self, step: int, total: int) -> tuple[int, int]:
        """p, the steps since the warm-up (negative before its end), and M, the length of the window."""
        c = self.config
        return math.floor(step - c.warmup * total), int(total * (1 - c.warmup - c.final))

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        c, parts, (p, M) = self.config, list(self.parts.values()), self.when(step, total)
        if step + 1 - c.warmup * total > M:
            self.penalised.zero_()
        if p <= M:
            self.H.lerp_(torch.stack([part.score() for part in parts]), 1 - c.beta)
        if 0 <= p <= M and (p % c.interval == 0 or p == M):
            k = int(len(parts) * (self.r0 - c.r) * (p / M if M else 1.0) ** 3)
            lowest = self.H.flatten().argsort(stable=True)[: max(k, 1)]
            weak = torch.zeros_like(self.gone).flatten().index_fill_(0, lowest, True).view_as(self.gone)
            self.close(weak)
            if p == M:
                self.gone.copy_(weak)
        elif p > M:
            self.close(self.gone)

    def close(self, which: Tensor) -> None:
        """Set the gates to zero where `which` (N, r0) says so."""
        for part, mask in zip(self.parts.values(), which, strict=True):
            part.c.masked_fill_(mask, 0.0)
