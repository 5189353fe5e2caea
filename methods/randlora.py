"""RandLoRA: a full-rank change, the sum of N frozen random products with trained diagonals between.

    U[k N + j] = Lam[k, j] A[k] * Gam[j]      dW = s B U, or its transpose where out < in
    y = x W^T + b + drop(x) dW^T      A (r, d), B (D, N r) frozen, Lam (r, N), Gam (N, d) trained, U (N r, d)

d and D are the smaller and the larger of in and out, N = ceil(d / r). A and B are slices of one pair for the
whole model, uniform (or sparse: -1, 0, 1), divided by their standard deviation, drawn from the seed.
Lam = 0, Gam = 1 / max(N, d): a start at the base. Trained: N (r + d) per layer, so a smaller r trains more.
Paper: Albert et al., arXiv 2502.00987, writes sum_j B_j diag(Lam_j) A diag(Gam_j). Its code and HF PEFT pair
the columns of B, counted j r + k, with the rows of U, counted k N + j, as is done here: the paper's formula
with B's columns in another order. s = alpha / r as in PEFT; the official code divides by sqrt(N) too.
Different: with few tokens the two products are applied in turn and U is made again in backward, with many the
dense change is. B is as large as the widest layers need (PEFT's is larger).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import cast, exact, in_place, rebuilt


def scaled(A: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    """A (r, d), Lam (r, N), Gam (N, d) -> U (r N, d)"""
    return (lam[:, :, None] * A[:, None, :] * gam).flatten(0, 1)


class _Chain(torch.autograd.Function):
    """s (x R^T) L^T with (L, R) = (B, U), or (U^T, B^T) where `up` is false, which is x dW^T.

    Saved for backward: x for U on the input side, x B for U on the output side, and the two diagonals.
    """

    @staticmethod
    def forward(ctx, x, A, B, lam, gam, s, up):
        X, U, B_ = x.reshape(-1, x.shape[-1]), scaled(A, lam, gam).to(x.dtype), B.to(x.dtype)
        H = torch.mm(X, U.T if up else B_).mul_(s)  # (T, N r)
        ctx.s, ctx.up, ctx.shape = s, up, x.shape
        ctx.save_for_backward(X if up else H, A, B, lam, gam)
        return torch.mm(H, B_.T if up else U).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        kept, A, B, lam, gam = ctx.saved_tensors
        D, up = dy.reshape(-1, dy.shape[-1]), ctx.up
        U, B = scaled(A, lam, gam).to(D.dtype), B.to(D.dtype)
        with exact(dy):
            dH = torch.mm(D, B if up else U.T).mul_(ctx.s)  # (T, N r)
            dX = torch.mm(dH, U if up else B.T).view(ctx.shape) if ctx.needs_input_grad[0] else None
            dU = torch.mm(dH.T if up else kept.T, kept if up else D)  # (N r, d)
            Q = dU.to(A.dtype).view(*lam.shape, -1) * A[:, None, :]  # (r, N, d)
            dlam, dgam = torch.einsum("kjv,jv->kj", Q, gam), torch.einsum("kjv,kj->jv", Q, lam)
        return dX, None, None, dlam, dgam, None, None


class RandLoRAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_) = owner.config, site.shape
        d, N = min(out, in_), -(-min(out, in_) // c.r)
        self.up = in_ <= out
        self.lam = nn.Parameter(torch.zeros(c.r, N))
        self.gam = nn.Parameter(torch.full((N, d), 1 / max(N, d)))
        self.s = c.alpha / c.r / (math.sqrt(N) if c.scaling == "paper" else 1)
        self.dropout = nn.Dropout(c.dropout)

    def bases(self) -> tuple[Tensor, Tensor]:
        """This layer's A (r, d) and B (D, N r), views of the shared pair."""
        d, D = sorted(self.site.shape)
        return self.owner.A[:, :d], self.owner.B[:D, : self.lam.numel()]

    def change(self, W: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
        A, B = (M.to(W.dtype) for M in self.bases())
        dW = self.s * B @ scaled(A, lam, gam)  # (D, d)
        return dW if self.up else dW.T

    def delta(self, W: Tensor) -> Tensor:
        return self.change(W, self.lam, self.gam)

    def dense(self, x: Tensor) -> bool:
        """Whether a step with dW built costs less than one with two products; counted in units of x W^T."""
        (d, D), T = sorted(self.site.shape), x.numel() // x.shape[-1]
        full = cast(x).dtype in (torch.float32, torch.float64)
        return 3 * d / T + (1 if full else 3) < 2 + 3 * d / D

    def forward(self, base, x: Tensor) -> Tensor:
        if not self.dropout.p and self.dense(x):
            return rebuilt(self.site, base, x, self.change, self.lam, self.gam)
        X = cast(self.dropout(x))
        z = _Chain.apply(X, *self.bases(), self.lam, self.gam, self.s, self.up)
        return in_place(self.site, base(x), z)


class RandLoRA(Adapter):
    name = "randlora"
    title = "RandLoRA: full-rank adaptation from random bases"
    paper = "Albert et al., RandLoRA, arXiv 2502.00987 (ICLR 2025)"
    family = "shared"
    count_formula = "ceil(min(in, out) / r) * (r + min(in, out))"
    peft = "RandLoraConfig"
    peft_names: ClassVar[dict] = {"alpha": "randlora_alpha", "dropout": "randlora_dropout"}
    redrawn = True
    lr = 1.5e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(32, ge=1, description="rank of one basis; a smaller one trains more")
        alpha: float = Field(640.0, gt=0, description="scale numerator")
        scaling: Literal["peft", "paper"] = Field("peft", description="s = alpha/r, or alpha/(r sqrt(N))")
        bases: Literal["uniform", "sparse", "very-sparse"] = Field(
            "uniform", description="entries of A and B; sparse: a third is not zero, very: 1/sqrt(d)"
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    tiny: ClassVar = {"r": 8}
    variants: ClassVar[list] = [{"r": 5}]

    def prepare(self, sites: list[Site]) -> None:
        r = self.config.r
        d, D = (max(sizes) for sizes in zip(*(sorted(s.shape) for s in sites), strict=True))
        self.register_buffer("A", self.draw("A", r, d, d), persistent=False)
        self.register_buffer("B", self.draw("B", D, -(-d // r) * r, d), persistent=False)

    def draw(self, key: str, rows: int, columns: int, d: int) -> Tensor:
        """Random entries with standard deviation 1."""
        M, kind = self.ctx.uniform(rows, columns, bound=1.0, key=key), self.config.bases
        if kind != "uniform":
            share = 1 / 3 if kind == "sparse" else d**-0.5
            M = torch.where(M.abs() > 1 - share, M.sign(), 0.0)
        return M if M.is_meta else M / M.std()

    def part(self, site: Site) -> Part:
        return RandLoRAPart(site, self)

    def peft_config(self, sites: list[Site]) -> dict:
        c = self.config
        if c.scaling == "paper":
            raise NotImplementedError("HF PEFT scales by alpha/r alone")
        options = {"sparse": c.bases == "sparse", "very_sparse": c.bases == "very-sparse"}
        return super().peft_config(sites) | options

    @classmethod
    def from_peft(cls, config, sites: list[Site]) -> dict:
        bases = "very-sparse" if config.very_sparse else "sparse" if config.sparse else "uniform"
        return super().from_peft(config, sites) | {"bases": bases}

    def peft_state(self) -> dict[str, Tensor]:
        state = {f"{p.site.name}.randlora_lambda.default": p.lam for p in self.parts.values()}
        return state | {f"{p.site.name}.randlora_gamma.default": p.gam for p in self.parts.values()}

    def peft_frozen(self) -> dict[str, Tensor]:
        B = self.B.unflatten(1, (-1, self.config.r))
        return {"randlora_A.default": self.A[:, None], "randlora_B.default": B}
