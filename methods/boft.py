"""BOFT: the input of each weight is rotated by a product of m block rotations that mix ever farther inputs.

    y = s * ((x F_m .. F_1) W^T) + b        F_i = P_i blockdiag(R_i1, .., R_ik) P_i^T, k c = in, s (out,)
    R = (I - Q)(I + Q)^-1, Q = (A - A^T) / 2, A (c, c)        merged: W' = diag(s) W (F_m .. F_1)^T

P_i, the butterfly permutation, interleaves the halves of each run of 2^i half blocks (of c / 2 inputs), so
that a block of F_i joins half blocks that lie 2^(i-1) apart; P_1 = I. A = 0, s = 1: the start is the base.
Trained: m in c + out per layer, A being stored in full (effective m in (c - 1) / 2).
Paper: Liu et al., arXiv 2311.06243; the scale s is HF PEFT's, the bias is not scaled. Different: a
permutation is a transpose of the activations, where HF PEFT multiplies (in, in) matrices and, without its
CUDA kernel, takes m = 1 whatever it is told.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import cast, cayley, recomputed, rotate_blocks, scaled


def butterfly(x: Tensor, R: Tensor, i: int) -> Tensor:
    """x F_i, x (..., in), R (k, c, c), i from 0."""
    if i == 0:
        return rotate_blocks(x, R)
    X = x.unflatten(-1, (-1, 2, 2**i, R.shape[-1] // 2)).transpose(-3, -2)  # (..., runs, 2^i, 2, c / 2)
    Y = rotate_blocks(X.flatten(-4), R).unflatten(-1, X.shape[-4:])
    return Y.transpose(-3, -2).flatten(-4)


def rotations(A: Tensor) -> Tensor:
    return cayley((A - A.mT) / 2)


def rotate(x: Tensor, A: Tensor) -> Tensor:
    """x F_m .. F_1, A (m, k, c, c)."""
    R = rotations(A)
    for i in reversed(range(len(R))):
        x = butterfly(x, R[i], i)
    return x


class BOFTPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_) = owner.config, site.shape
        run = c.block * 2 ** (c.factors - 1)
        if in_ % run:
            raise UserError(
                f'method "boft": block * 2^(factors - 1) = {run} must divide the {in_} inputs of {site.name}'
            )
        self.A = nn.Parameter(torch.zeros(c.factors, in_ // c.block, c.block, c.block))
        self.s = nn.Parameter(torch.ones(out))

    def delta(self, W: Tensor) -> Tensor:
        V = W
        for i, R in enumerate(rotations(self.A)):
            V = butterfly(V, R.mT, i)  # W F_1^T .. F_m^T
        return self.s[:, None] * V - W

    def forward(self, base, x: Tensor) -> Tensor:
        X, b = recomputed(rotate, cast(x), self.A), self.site.bias
        return scaled(self.site, base, X, self.s, None if b is None else b - self.s * b)


class BOFT(Adapter):
    name = "boft"
    title = "Butterfly Orthogonal Finetuning"
    paper = (
        "Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243"
    )
    family = "orthogonal"
    count_formula = "factors * in * block + out"
    peft = "BOFTConfig"
    peft_names: ClassVar[dict] = {"block": "boft_block_size", "factors": "boft_n_butterfly_factor"}
    lr = 5e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        factors: int = Field(2, ge=1, description="number m of rotations in the product")
        block: int = Field(8, ge=2, multiple_of=2, description="size c of a block")

    tiny: ClassVar[dict] = {"block": 4, "factors": 2}
    variants: ClassVar[list] = [{"factors": 1}, {"factors": 3}]

    def part(self, site: Site) -> Part:
        return BOFTPart(site, self)

    def peft_config(self, sites: list[Site]) -> dict:
        if self.config.factors > 1:
            raise NotImplementedError("HF PEFT needs its own CUDA kernel for more than one factor")
        return super().peft_config(sites)

    def peft_state(self) -> dict[str, Tensor]:
        state = {f"{p.site.name}.boft_R.default": p.A for p in self.parts.values()}
        return state | {f"{p.site.name}.boft_s.default": p.s[:, None] for p in self.parts.values()}
