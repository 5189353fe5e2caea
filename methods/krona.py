"""KronA: the weight change is one Kronecker product of two small full matrices.

    y = x W^T + b + s * x kron(A, B)^T        A (a1, a2), B (b1, b2), out = a1 b1, in = a2 b2
    x kron(A, B)^T = vec(A X B^T), X (a2, b2) = x row by row

rank(kron(A, B)) = rank(A) rank(B), so the change may have full rank. Each size is split by its divisors
nearest to the square root, where the count is least; `rows` and `columns` set the shape of A by hand. A = 0,
B ~ U(-1/sqrt(b2), 1/sqrt(b2)). Trained: a1 a2 + b1 b2 per layer (768 x 768: 1,600; 4096 x 4096: 8,192).
Paper: Edalati et al., arXiv 2212.10650, the mergeable form beside a linear layer; KronA_B beside the FFN
is left out. Its initial distributions, scale and shapes were not found: the start is LoKr's, and s = 1.
HF PEFT makes the same with LoKr and a rank so large that both factors are full.
"""

from __future__ import annotations

from math import isqrt
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import plus_kron


class KronAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_) = owner.config, site.shape
        a1, a2 = divisor(out, c.rows, site), divisor(in_, c.columns, site)
        b1, b2 = out // a1, in_ // a2
        self.A = nn.Parameter(torch.zeros(a1, a2))
        self.B = nn.Parameter(owner.ctx.uniform(b1, b2, bound=b2**-0.5, key=site.name))
        self.s = c.scale

    def delta(self, W: Tensor) -> Tensor:
        return self.s * torch.kron(self.A, self.B)

    def forward(self, base, x: Tensor) -> Tensor:
        return plus_kron(self.site, base, x, self.s, self.A, self.B)


def divisor(d: int, wanted: int | None, site: Site) -> int:
    """`wanted`, or the largest divisor of d up to sqrt(d). Raises `UserError` for no divisor."""
    if wanted is None:
        return max(m for m in range(1, isqrt(d) + 1) if d % m == 0)
    if d % wanted:
        raise UserError(
            f'method "krona": {wanted} does not divide {d} of layer {site.name}: choose a divisor'
        )
    return wanted


class KronA(Adapter):
    name = "krona"
    title = "Kronecker Adapter"
    paper = "Edalati et al., KronA, arXiv 2212.10650 (ENLSP-III workshop, NeurIPS 2023)"
    family = "structured"
    count_formula = (
        "(rows or divisor(out)) * (columns or divisor(in))"
        " + out // (rows or divisor(out)) * (in // (columns or divisor(in)))"
    )
    peft = "LoKrConfig"
    trained_as = "lokr"
    lr = 3e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        rows: int | None = Field(None, ge=1, description="rows of A, a1; by default nearest to sqrt(out)")
        columns: int | None = Field(
            None, ge=1, description="columns of A, a2; by default nearest to sqrt(in)"
        )
        scale: float = Field(1.0, gt=0, description="s, a constant factor on the change")

    variants: ClassVar[list] = [{"scale": 1.5}]

    def part(self, site: Site) -> Part:
        return KronAPart(site, self)

    def peft_config(self, sites: list[Site]) -> dict:
        """LoKr with a rank that leaves both factors full; it splits as we do by default."""
        r = max(max(p.B.shape) for p in self.parts.values())
        return super().peft_config(sites) | {"r": r, "alpha": r * self.config.scale}

    @classmethod
    def from_peft(cls, config, sites: list[Site]) -> dict:
        return {"scale": config.alpha / config.r}

    def peft_state(self) -> dict[str, Tensor]:
        state = {f"{p.site.name}.lokr_w1.default": p.A for p in self.parts.values()}
        return state | {f"{p.site.name}.lokr_w2.default": p.B for p in self.parts.values()}
