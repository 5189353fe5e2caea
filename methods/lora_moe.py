"""A mixture of LoRA experts: each token goes to the k of n small LoRAs that a router picks for it.

    p = softmax(x R^T),   g = the k largest of p, scaled to sum 1, else 0       R (n, in), per layer and token
    y = x W^T + b + s sum_e g_e (drop(x) A_e^T) B_e^T          A_e (r, in), B_e (out, r), s = alpha / r
    loss + aux * mean over layers of n sum_e f_e P_e            f, P (n,): share of the tokens e gets, mean p

With k = 1 the gate is p itself, since 1 would give R no gradient. f and P are means over the tokens of one
forward pass that are no padding; only P has a gradient. The balance is k when all experts are used alike, n
when all tokens take the same. A as in LoRA, B = 0, R ~ N(0, 0.02^2): with R = 0 all tokens take the same.
Trained: n (r (in + out) + in) per layer (Llama-2-7B, r = 8, n = 8: 169,017,344). It cannot be merged.
Papers: MixLoRA, Li et al., arXiv 2404.15159; LoRAMoE, Dou et al., arXiv 2312.09979. Different: every adapted
layer has its own router, where MixLoRA has one per block, and its balance is the mean over layers, where
MixLoRA's code pools the layers first. All experts are one wide LoRA whose rank-space the gates multiply. Of
micro-batches the last gives the balance.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftzoo.contract import MODEL, Adapter, Config, Part, Site, Targets, find_sites
from peftzoo.kernels import active, cast, in_place, keep_top


def gates(p: Tensor, k: int) -> Tensor:
    """(..., n): the k largest of p, scaled to sum 1; for k = 1 the largest itself. The others are 0."""
    return keep_top(p, k) if k > 1 else p * keep_top(p, 1).detach()


def balance(p: Tensor, taken: Tensor, valid: Tensor) -> Tensor:
    """n sum_e f_e P_e of a layer, from p and taken (tokens, n), over the tokens with valid (tokens,) = 1."""
    valid = valid.to(p.dtype) / valid.sum()
    return p.shape[1] * ((valid @ taken.to(p.dtype)) * (valid @ p)).sum()


class WholePart(Part):
    """Around the model: which tokens are padding; a pass made again in backward is outside, and adds none."""

    def forward(self, base, *args: Any, **kwargs: Any) -> Any:
        o = self.owner
        o.balances, o.counts, o.mask = [], True, kwargs.get("attention_mask")
        try:
            return base(*args, **kwargs)
        finally:
            o.counts = False


class ExpertsPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_) = owner.config, site.shape
        self.A = nn.Parameter(owner.ctx.uniform(c.n * c.r, in_, bound=in_**-0.5, key=f"{site.name}/A"))
        self.B = nn.Parameter(torch.zeros(out, c.n * c.r))
        self.R = nn.Parameter(owner.ctx.normal(c.n, in_, std=0.02, key=f"{site.name}/R"))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, base, x: Tensor) -> Tensor:
        c, X = self.owner.config, cast(x)
        if active(self.dropout):
            H, logits = F.linear(self.dropout(X), self.A.to(X.dtype)), F.linear(X, self.R.to(X.dtype))
        else:
            both = F.linear(X, torch.cat([self.A, self.R]).to(X.dtype))  # (..., n r + n)
            H, logits = both.split([c.n * c.r, c.n], -1)
        p = logits.to(self.R.dtype).softmax(-1)
        g = gates(p, c.k)
        self.owner.count(p, g)
        H = (H.unflatten(-1, (c.n, c.r)) * g.to(H.dtype)[..., None]).flatten(-2)
        return in_place(self.site, base(x), F.linear(H, (c.alpha / c.r * self.B).to(H.dtype)))


class LoRAMoE(Adapter):
    name = "lora-moe"
    title = "Mixture of LoRA experts"
    paper = "Li et al., MixLoRA, arXiv 2404.15159; Dou et al., LoRAMoE, arXiv 2312.09979 (ACL 2024)"
    family = "low-rank"
    count_formula = "n * (r * (in + out) + in)"
    lr = 3e-3
    mergeable = False

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        n: int = Field(8, ge=2, description="experts per layer")
        k: int = Field(2, ge=1, description="experts per token, at most n")
        r: int = Field(8, ge=1, description="rank of an expert")
        alpha: float = Field(16.0, gt=0, description="scale numerator, s = alpha/r")
        aux: float = Field(0.01, ge=0, description="weight of the balance in the loss")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the experts' input")

        @model_validator(mode="after")
        def _enough(self):
            if self.k > self.n:
                raise ValueError(f"k={self.k} of n={self.n} experts: lower k or raise n")
            return self

    tiny: ClassVar[dict] = {"n": 4, "r": 2}
    variants: ClassVar[list] = [{"k": 1}, {"k": 4}]

    def sites(self, model: nn.Module) -> list[Site]:
        return [*find_sites(model, (), MODEL), *super().sites(model)]

    def prepare(self, sites: list[Site]) -> None:
        self.balances, self.counts, self.mask = [], False, None

    def part(self, site: Site) -> Part:
        return (WholePart if site.kind == MODEL else ExpertsPart)(site, self)

    def count(self, p: Tensor, g: Tensor) -> None:
        """Add the balance of one layer of the present forward pass, for `penalty`."""
        if self.training and self.config.aux:
            p, taken = p.flatten(0, -2), g.detach().flatten(0, -2) > 0
            fits = self.mask is not None and self.mask.numel() == len(p)
            valid = self.mask.flatten() if fits else torch.ones(len(p), device=p.device)
            of_layer = balance(p, taken, valid)
            self.balances += [of_layer] if self.counts else []

    def penalty(self) -> Tensor | float:
        return self.config.aux * torch.stack(self.balances).mean() if self.balances else 0.0

    def after_step(self, step: int, total: int) -> None:
        self.balances, self.mask = [], None  # the graph of the last pass goes
