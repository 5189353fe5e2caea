"""QR-LoRA: an orthonormal basis from a QR of the weight, frozen, and little trained on it. Two papers.

    delta-r, triu:  y = x W^T + b + s * (drop(x) D^T) Q^T        Q (out, r) frozen, D (r, in), s = alpha / r
    lambda:         y = x W^T + b + ((drop(x) R^T) * l) Q^T      Q (out, r), R (r, in) frozen, l (r,)

`delta-r` (arXiv 2507.04599): Q R is the QR of U_r (S_r / s) V_r^T, from the SVD of W; D is the change of R,
zero at the start. The paper splits off W - s Q R and adds s Q (R + D): the same as W + s Q D, which leaves W
alone. Trained: r in per layer. `triu`: D is upper triangular (D_ij = 0 for j < i), r in - r (r - 1) / 2
numbers, and the rest is not stored. Adapters of one W share Q, so they combine by adding their D.
`lambda` (arXiv 2508.21810): W P = Q T with column pivoting, T_11 >= T_22 >= ..., R = T P^T; l = 0 at the
start (l = 1 at full rank would add W). Trained: r per layer, given, or as few as reach the share
`tau` of sum T_ii^2 (on bare shapes, without weights, those are counted as all there are).

No code was found for 2508.21810: l = 0, the squares under tau and the sites are our reading of its abstract
and of summaries. 2507.04599 tunes an image model with r = alpha = 64. Different: the frozen factors are taken
from W again, with fixed signs, and not saved; the mode that trains Q and R themselves is left out.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import check_rank, frozen_core, low_rank, pivoted_qr, rows_first, top_qr, top_svd


class DeltaRPart(Part):
    """s Q D"""

    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, in_, r = owner.config, site.shape[1], owner.config.r
        check_rank(site, r)
        U, S, Vt = top_svd(site.weight, r, owner.ctx, site.name)
        self.scale = c.alpha / r
        Q, _ = top_qr(S[:, None] / self.scale * Vt, r)  # the QR of U C is (U Q') R for the QR Q' R of C
        self.register_buffer("Q", rows_first(U @ Q), persistent=False)
        self.triangular = c.form == "triu"
        if self.triangular:
            self.T = nn.Parameter(torch.zeros(r * (r + 1) // 2))  # the first r columns, row by row
            self.D = nn.Parameter(torch.zeros(r, in_ - r))
            rows, columns = torch.triu_indices(r, r)
            self.register_buffer("place", rows * r + columns, persistent=False)
        else:
            self.D = nn.Parameter(torch.zeros(r, in_))
        self.dropout = nn.Dropout(c.dropout)

    def change(self) -> Tensor:
        """D (r, in)"""
        if not self.triangular:
            return self.D
        r = len(self.D)
        T = self.T.new_zeros(r * r).index_put((self.place,), self.T).view(r, r)
        return torch.cat([T, self.D], 1)

    def delta(self, W: Tensor) -> Tensor:
        return self.scale * self.Q @ self.change()

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, self.change(), self.Q, self.scale, self.dropout)


class LambdaPart(Part):
    """Q diag(l) R"""

    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c = owner.config
        if c.tau is None:
            check_rank(site, c.r)
        Q, R, T = pivoted_qr(site.weight, c.r if c.tau is None else None)
        if c.tau is not None and not owner.ctx.meta:
            energy = T.square().cumsum(0) / T.square().sum()
            r = min(int((energy < c.tau).sum()) + 1, len(T))
            Q, R, T = Q[:, :r], R[:r], T[:r]
        self.register_buffer("Q", rows_first(Q), persistent=False)
        self.register_buffer("R", R.contiguous(), persistent=False)
        self.l = nn.Parameter(torch.zeros_like(T))
        self.dropout = nn.Dropout(c.dropout)

    def delta(self, W: Tensor) -> Tensor:
        return (self.Q * self.l) @ self.R

    def forward(self, base, x: Tensor) -> Tensor:
        return frozen_core(self.site, base, x, self.R, self.Q, self.l, self.dropout)


class QRLoRA(Adapter):
    name = "qr-lora"
    title = "QR-Based Low-Rank Adaptation"
    paper = (
        "QR-LoRA: Efficient and Disentangled Fine-tuning via QR Decomposition, arXiv 2507.04599 (ICCV 2025); "
        "Liang & Bharadwaj, QR-LoRA, arXiv 2508.21810"
    )
    family = "low-rank"
    count_formula = (
        "r * in - (form == 'triu') * r * (r - 1) // 2 if form != 'lambda' else min(in, out) if tau else r"
    )
    lr = 1e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        form: Literal["delta-r", "triu", "lambda"] = Field("delta-r", description="what is trained on Q")
        r: int = Field(16, ge=1, description="rank")
        tau: float | None = Field(
            None,
            gt=0,
            le=1,
            description="lambda: not r directions but as many as reach this share of sum T_ii^2",
        )
        alpha: float = Field(16.0, gt=0, description="delta-r and triu: scale numerator, s = alpha/r")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    def part(self, site: Site) -> Part:
        return (LambdaPart if self.config.form == "lambda" else DeltaRPart)(site, self)
