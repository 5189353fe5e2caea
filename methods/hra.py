"""HRA: each weight is multiplied by a chain of r Householder reflections.

    y = x (W H)^T + b        H = prod_i (I - 2 u_i u_i^T)        u_i = U[:, i] / |U[:, i]|, U (in, r)

With unit columns in U, H = I - U T U^T and T = (I / 2 + strictly upper part of U^T U)^-1 (r, r), the compact
WY form, so x H^T = x - (x U T^T) U^T costs two thin products; no (in, in) matrix is built (HF PEFT does).
U ~ U(-sqrt(2 / r), sqrt(2 / r)), every column twice: neighbours cancel and the start is the base; r is even.
`gram_schmidt` (the paper's lambda = infinity) makes the u_i orthogonal, so that H = I - 2 U (U^T U)^-1 U^T;
its columns are all drawn, and its start is not the base. `penalty` weighs (lambda) sum |I - U^T U|^2 in the
loss; that U has unit columns there too is our reading. HF PEFT has no penalty.
Trained: r in per layer. Paper: Yuan et al., arXiv 2405.17484.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import cast, exact


class HRAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, in_ = owner.config, site.shape[1]
        columns = c.r if c.gram_schmidt else c.r // 2
        U = owner.ctx.uniform(in_, columns, bound=columns**-0.5, key=site.name)
        self.U = nn.Parameter(U if c.gram_schmidt else U.repeat_interleave(2, dim=1))
        self.orthogonal = c.gram_schmidt

    def pair(self) -> tuple[Tensor, Tensor]:
        """U with unit columns and V = U T^T, both (in, r): H^T = I - V U^T."""
        U = F.normalize(self.U, dim=0, eps=1e-12)
        G, E = U.T @ U, torch.eye(U.shape[1], device=U.device, dtype=U.dtype)
        if self.orthogonal:
            return U, 2 * torch.linalg.solve(G, U.T).T
        return U, torch.linalg.solve_triangular(E / 2 + G.triu(1), U.T, upper=True).T

    def delta(self, W: Tensor) -> Tensor:
        U, V = self.pair()
        return -(W @ U) @ V.T

    def forward(self, base, x: Tensor) -> Tensor:
        with exact(x):
            U, V = (M.to(cast(x).dtype) for M in self.pair())
            X = cast(x).reshape(-1, len(U))  # (n, in)
            X = torch.addmm(X, X @ V, U.T, alpha=-1)
        return base(X.view_as(x))


class HRA(Adapter):
    name = "hra"
    title = "Householder Reflection Adaptation"
    paper = "Yuan et al., Bridging The Gap between Low-rank and Orthogonal Adaptation, arXiv 2405.17484"
    family = "orthogonal"
    count_formula = "r * in"
    peft = "HRAConfig"
    peft_names: ClassVar[dict] = {"gram_schmidt": "apply_GS"}
    lr = 1e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=2, multiple_of=2, description="number of reflections")
        gram_schmidt: bool = Field(False, description="orthogonal reflections")
        penalty: float = Field(0.0, ge=0, description="weight of |I - U^T U|^2 in the loss")

    tiny: ClassVar[dict] = {"r": 4}

    def part(self, site: Site) -> Part:
        return HRAPart(site, self)

    def penalty(self) -> Tensor | float:
        if not self.config.penalty:
            return 0.0
        grams = (U.T @ U for U in (F.normalize(p.U, dim=0, eps=1e-12) for p in self.parts.values()))
        return self.config.penalty * sum(
            (G - torch.eye(len(G), device=G.device)).square().sum() for G in grams
        )

    def peft_state(self) -> dict[str, Tensor]:
        return {f"{p.site.name}.hra_u.default": p.U for p in self.parts.values()}
