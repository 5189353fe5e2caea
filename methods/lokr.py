"""LoKr: a Kronecker product whose large factor is itself low-rank.

    y = x W^T + b + s * x kron(W1, W2)^T        W1 (m_o, m_i), W2 = A2 B2 (n_o, n_i), s = alpha / r
    out = m_o n_o, in = m_i n_i, A2 (n_o, r), B2 (r, n_i)

Each size d is split into m n, m <= n, with m nearest to sqrt(d), or by `factor`. W2 is one full matrix
where r >= max(n_o, n_i) / 2, and W1 = A1 B1 with `decompose_both` where r < max(m_o, m_i) / 2; s keeps r in
both cases. W1 (or A1) = 0, the other factors ~ U(-1/sqrt(columns), 1/sqrt(columns)); "lycoris" zeroes W2 (or
B2) instead. Trained: m_o m_i + r (n_o + n_i) per layer in the usual case (4096 x 4096, r = 8: 5,120).
Paper: Yeh et al., LyCORIS, arXiv 2309.14859. Different: W1 acts between B2 and A2, where the width is r, so
a token costs r (in + out + m_i m_o) and no (out, in) matrix is built. A prime size gives m = 1: scaled LoRA.
"""

from __future__ import annotations

from math import isqrt
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import exact, plus_kron


def split(d: int, factor: int | None = None) -> tuple[int, int]:
    """(m, n) with m n = d: m = `factor` where it divides d, else the largest divisor up to it and sqrt(d)."""
    if factor and d % factor == 0:
        return factor, d // factor
    top = min(isqrt(d), factor or d)
    m = max(m for m in range(1, top + 1) if d % m == 0)
    return m, d // m


class LoKrPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_) = owner.config, site.shape
        (m_o, n_o), (m_i, n_i) = split(out, c.factor), split(in_, c.factor)
        pair1 = c.decompose_both and c.r < max(m_o, m_i) / 2
        pair2 = c.r < max(n_o, n_i) / 2
        shapes = {"A1": (m_o, c.r), "B1": (c.r, m_i)} if pair1 else {"W1": (m_o, m_i)}
        shapes |= {"A2": (n_o, c.r), "B2": (c.r, n_i)} if pair2 else {"W2": (n_o, n_i)}
        zero = ("W1", "A1") if c.init == "peft" else ("W2", "B2")
        for name, shape in shapes.items():
            drawn = owner.ctx.uniform(*shape, bound=shape[1] ** -0.5, key=f"{site.name}/{name}")
            setattr(self, name, nn.Parameter(torch.zeros(shape) if name in zero else drawn))
        self.pair1, self.pair2, self.s = pair1, pair2, c.alpha / c.r

    def factors(self) -> tuple[Tensor, ...]:
        """W1, W2 or W1, A2, B2"""
        with exact(next(self.parameters())):
            W1 = self.A1 @ self.B1 if self.pair1 else self.W1
        return (W1, self.A2, self.B2) if self.pair2 else (W1, self.W2)

    def delta(self, W: Tensor) -> Tensor:
        W1, W2, *B2 = self.factors()
        return self.s * torch.kron(W1, W2 @ B2[0] if B2 else W2)

    def forward(self, base, x: Tensor) -> Tensor:
        return plus_kron(self.site, base, x, self.s, *self.factors())


class LoKr(Adapter):
    name = "lokr"
    title = "Low-Rank Kronecker Product"
    paper = "Yeh et al., Navigating Text-To-Image Customization (LyCORIS), arXiv 2309.14859 (ICLR 2024)"
    family = "structured"
    peft = "LoKrConfig"
    peft_names: ClassVar[dict] = {"factor": "decompose_factor"}
    lr = 3e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=1, description="rank of the large factor")
        alpha: float = Field(8.0, gt=0, description="scale numerator, s = alpha/r")
        factor: int | None = Field(
            None, ge=1, description="size of the small factor; default nearest to sqrt"
        )
        decompose_both: bool = Field(False, description="low rank for the small factor too")
        init: Literal["peft", "lycoris"] = Field(
            "peft", description="start with the small factor 0, or the large"
        )

    tiny: ClassVar[dict] = {"r": 2, "alpha": 8}
    variants: ClassVar[list] = [{"r": 8}, {"decompose_both": True, "factor": 8}]

    def part(self, site: Site) -> Part:
        return LoKrPart(site, self)

    def peft_config(self, sites: list[Site]) -> dict:
        init = "lycoris" if self.config.init == "lycoris" else True
        options = {"decompose_factor": self.config.factor or -1, "init_weights": init}
        return super().peft_config(sites) | options

    @classmethod
    def from_peft(cls, config, sites: list[Site]) -> dict:
        factor = None if config.decompose_factor == -1 else config.decompose_factor
        init = "lycoris" if config.init_weights == "lycoris" else "peft"
        return super().from_peft(config, sites) | {"factor": factor, "init": init}

    def peft_state(self) -> dict[str, Tensor]:
        theirs = {"W1": "w1", "A1": "w1_a", "B1": "w1_b", "W2": "w2", "A2": "w2_a", "B2": "w2_b"}
        return {
            f"{part.site.name}.lokr_{theirs[name]}.default": p
            for part in self.parts.values()
            for name, p in part.named_parameters()
        }
