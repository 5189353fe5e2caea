"""AdaLoRA: LoRA in the form of an SVD, whose rank is spent where the loss is sensitive.

    y = x W^T + b + s * (drop(x) (E * A)^T) B^T    A (r0, in), E (r0, 1), B (out, r0), s = alpha / (r0 + 1e-5)

A, B ~ N(0, 0.02^2), E = 0. Trained: r0 (in + out + 1) per layer; at the end r of the r0 ranks per layer are
left on average, the others have E_i = 0. The loss gets gamma times the mean, over all A and B, of
|A A^T - I|_F or |B^T B - I|_F. An entry p scores I * U: I the running mean of |p dL/dp|, U that of its
distance from I. A rank scores what E_i does, plus the means over A_i and over B_i. The b(t) best ranks of all
N layers keep their E_i, at every `interval`-th step:
    b(t) = r N + (r0 - r) N (1 - (t - t_i) / (T - t_f - t_i))^3        t_i < t <= T - t_f
and then r N, with scores as they were at T - t_f. Until then a masked E_i may grow again.

Paper: Zhang et al., arXiv 2303.10512; its code does not square the norms and starts b(t) at t_i, unlike the
text, and so do we. Different: t_i and t_f are shares of the steps; scores use the values before the step, as
in the paper (HF PEFT: after it), and gradients before clipping; exactly b(t) ranks stay, ties or not.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import low_rank


class AdaLoRAPart(Part):
    def __init__(self, site: Site, owner: Adapter, r0: int) -> None:
        super().__init__(site, owner)
        c, ctx, (out, in_) = owner.config, owner.ctx, site.shape
        self.A = nn.Parameter(ctx.normal(r0, in_, std=0.02, key=f"{site.name}/A"))
        self.E = nn.Parameter(torch.zeros(r0, 1))
        self.B = nn.Parameter(ctx.normal(out, r0, std=0.02, key=f"{site.name}/B"))
        for name in ("A", "E", "B"):
            for what in ("mean", "spread"):
                zero = torch.zeros_like(getattr(self, name).detach())
                self.register_buffer(f"{what}_{name}", zero, persistent=False)
        self.scale = c.alpha / (r0 + 1e-5)
        self.dropout = nn.Dropout(c.dropout)

    def delta(self, W: Tensor) -> Tensor:
        return self.scale * self.B @ (self.E * self.A)

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, self.E * self.A, self.B, self.scale, self.dropout)

    def watch(self, beta1: float, beta2: float) -> None:
        """Take the sensitivity of every entry into the running means."""
        for name in ("A", "E", "B"):
            p, I = getattr(self, name), getattr(self, f"mean_{name}")  # noqa: E741
            now = (p * p.grad).abs()
            I.lerp_(now, 1 - beta1)
            getattr(self, f"spread_{name}").lerp_((now - I).abs_(), 1 - beta2)

    def score(self) -> Tensor:
        """Importance of each rank, (r0,)"""
        A, B = self.mean_A * self.spread_A, self.mean_B * self.spread_B
        return (self.mean_E * self.spread_E)[:, 0] + A.mean(1) + B.mean(0)


class AdaLoRA(Adapter):
    name = "adalora"
    title = "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"
    paper = "Zhang et al., AdaLoRA, arXiv 2303.10512 (ICLR 2023)"
    family = "low-rank"
    count_formula = "(r0 or ceil(1.5 * r)) * (in + out + 1)"
    peft = "AdaLoraConfig"
    peft_names: ClassVar[dict] = {
        "r": "target_r",
        "r0": "init_r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "gamma": "orth_reg_weight",
    }
    lr = 1e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=1, description="mean rank per layer at the end")
        r0: int | None = Field(None, ge=1, description="rank at the start; by default 1.5 r, rounded up")
        alpha: float = Field(32.0, gt=0, description="scale numerator, s = alpha/(r0 + 1e-5)")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
        gamma: float = Field(0.1, ge=0, description="weight of the orthogonality penalty")
        beta1: float = Field(0.85, gt=0, lt=1, description="decay of the mean sensitivity")
        beta2: float = Field(0.85, gt=0, lt=1, description="decay of its spread")
        warmup: float = Field(0.1, ge=0, lt=1, description="t_i: share of the steps before any pruning")
        final: float = Field(0.5, ge=0, lt=1, description="t_f: share of the steps after the last pruning")
        interval: int = Field(1, ge=1, description="steps from one pruning to the next")

        @model_validator(mode="after")
        def _room(self):
            if self.warmup + self.final >= 1:
                raise ValueError(f"warmup {self.warmup} and final {self.final} leave no steps for pruning")
            if self.r0 is not None and self.r0 < self.r:
                raise ValueError(f"r0={self.r0} is below r={self.r}")
            return self

    def prepare(self, sites: list[Site]) -> None:
        self.r0 = self.config.r0 or math.ceil(1.5 * self.config.r)

    def part(self, site: Site) -> Part:
        return AdaLoRAPart(site, self, self.r0)

    def penalty(self) -> Tensor:
        pairs = [(p.A, p.B) for p in self.parts.values()]
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            grams = torch.stack([G for A, B in pairs for G in (A @ A.T, B.T @ B)])  # (2 N, r0, r0)
            eye = torch.eye(self.r0, device=grams.device)
            return self.config.gamma * torch.linalg.matrix_norm(grams - eye).mean()

    def budget(self, step: int, total: int) -> int | None:
        """b(t): how many ranks stay after this step; None while nothing is masked."""
        c, N = self.config, len(self.parts)
        start, end = int(c.warmup * total), total - int(c.final * total)
        if step >= end:
            return c.r * N
        if step <= start or step % c.interval:
            return None
        left = 1 - (step - start) / (end - start)
        return int((self.r0 - c.r) * N * left**3 + c.r * N)

    @torch.no_grad()
    def after_backward(self, step: int, total: int) -> None:
        if step < total - int(self.config.final * total):
            for part in self.parts.values():
                part.watch(self.config.beta1, self.config.beta2)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        if (b := self.budget(step, total)) is None:
            return
        parts = list(self.parts.values())
        scores = torch.cat([p.score() for p in parts])  # (N r0,)
        keep = torch.zeros_like(scores).index_fill_(0, scores.argsort(descending=True, stable=True)[:b], 1)
        for part, mask in zip(parts, keep.view(len(parts), -1, 1), strict=True):
            part.E.mul_(mask)

    def peft_config(self, sites: list[Site]) -> dict:
        return super().peft_config(sites) | {"init_r": self.r0, "total_step": 10}

    def peft_state(self) -> dict[str, Tensor]:
        return {
            f"{p.site.name}.lora_{name}.default": getattr(p, name)
            for p in self.parts.values()
            for name in "AEB"
        }
