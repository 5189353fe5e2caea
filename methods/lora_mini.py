"""LoRA-Mini: both factors of LoRA are split in two, and only the two inner halves are trained.

    y = x W^T + b0 + s (((drop(x) A_out^T) A^T) B^T) B_out^T      s = alpha / r
    A_out (a, in), B_out (out, b) frozen and random; A (r, a), B (b, r) trained

A_out ~ N(0, 1/in), B_out ~ N(0, 1/b), A ~ U(-1/sqrt(a), 1/sqrt(a)), B = 0: the start is the base.
Trained: r (a + b) per layer, whatever its width (RoBERTa-base q, v with r = 8, a = b = 64: 24,576, a twelfth
of LoRA's). The outer matrices are drawn again from the seed and not saved; `share_outer` gives all layers
slices of one pair.
Paper: Singh, Aher and Garg, arXiv 2411.15804. The specification is ours, after its abstract: shapes, start
and hyper-parameters of the paper were not found, and no result of it is reproduced here. Different: A A_out
and B_out B are made once per forward pass, a r in + b r out products, and applied as LoRA's factors.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import exact, low_rank


class LoRAMiniPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c = owner.config
        self.A = nn.Parameter(owner.ctx.uniform(c.r, c.a, bound=c.a**-0.5, key=f"{site.name}/A"))
        self.B = nn.Parameter(torch.zeros(c.b, c.r))
        if not c.share_outer:
            for name, M in zip(("A_out", "B_out"), owner.draw(site.name, *site.shape), strict=True):
                self.register_buffer(name, M, persistent=False)
        self.s, self.dropout = c.alpha / c.r, nn.Dropout(c.dropout)

    def outer(self) -> tuple[Tensor, Tensor]:
        """A_out (a, in) and B_out (out, b)."""
        out, in_ = self.site.shape
        holder = self.owner if self.owner.config.share_outer else self
        return holder.A_out[:, :in_], holder.B_out[:out]

    def factors(self) -> tuple[Tensor, Tensor]:
        """This layer as a LoRA: (r, in) and (out, r)."""
        A_out, B_out = self.outer()
        with exact(A_out):
            return self.A @ A_out, B_out @ self.B

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.factors()
        return self.s * B @ A

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, *self.factors(), self.s, self.dropout)


class LoRAMini(Adapter):
    name = "lora-mini"
    title = "LoRA-Mini: decomposed matrices, selectively trained"
    paper = "Singh, Aher and Garg, LoRA-Mini, arXiv 2411.15804 (AAAI 2025 workshop CoLoRAI)"
    family = "low-rank"
    count_formula = "r * (a + b)"
    lr = 1e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=1, description="rank")
        a: int = Field(64, ge=1, description="width between the two halves on the input side")
        b: int = Field(64, ge=1, description="width between the two halves on the output side")
        alpha: float = Field(16.0, gt=0, description="scale numerator, s = alpha/r")
        share_outer: bool = Field(False, description="one frozen outer pair for all layers, in slices")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    def prepare(self, sites: list[Site]) -> None:
        if self.config.share_outer:
            out, in_ = (max(sizes) for sizes in zip(*(s.shape for s in sites), strict=True))
            for name, M in zip(("A_out", "B_out"), self.draw("outer", out, in_), strict=True):
                self.register_buffer(name, M, persistent=False)

    def draw(self, key: str, out: int, in_: int) -> tuple[Tensor, Tensor]:
        """A frozen outer pair: A_out (a, in) and B_out (out, b)."""
        a, b, normal = self.config.a, self.config.b, self.ctx.normal
        return (
            normal(a, in_, std=in_**-0.5, key=f"{key}/A_out"),
            normal(out, b, std=b**-0.5, key=f"{key}/B_out"),
        )

    def part(self, site: Site) -> Part:
        return LoRAMiniPart(site, self)
