"""VeRA: two vectors per layer around one frozen random pair that all layers share.

    y = x W^T + b + v * ((u * (drop(x) A^T)) B^T)      A (r, in), B (out, r) frozen, u (r,), v (out,) trained

A = A*[:, :in], B = B*[:out] of one pair with the largest in and out among the adapted layers, drawn from the
run's seed (A* first): U(-c, c), c = sqrt(6 / fan in). u = `d`, v = 0: the identity. No alpha/r factor.
Trained: r + out per layer. Merged: W' = W + diag(v) B diag(u) A. A loaded adapter draws the pair again.
Paper: Kopiczko et al., arXiv 2310.11454. Different: layers that read the same x share the product x A^T.
Cost: for n tokens the cheapest exact plan known builds W' (r in out), H = x A^T (n r in) and dy^T H (n r
out), which give y, dx and both gradients; at r = 256, n = 512 that is 1.1 times the base's forward products.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import ForwardCache, frozen_pair


class VeRAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, _) = owner.config, site.shape
        self.u = nn.Parameter(torch.full((c.r,), c.d))
        self.v = nn.Parameter(torch.zeros(out))
        self.dropout = nn.Dropout(c.dropout)

    def pair(self) -> tuple[Tensor, Tensor]:
        """This layer's A (r, in) and B (out, r), views of the shared pair."""
        out, in_ = self.site.shape
        return self.owner.A[:, :in_], self.owner.B[:out]

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.pair()
        return (self.v[:, None] * B) @ (self.u[:, None] * A)

    def forward(self, base, x: Tensor) -> Tensor:
        A, B = self.pair()
        return frozen_pair(self.site, base, x, A, B, self.u, self.v, self.owner.recent, self.dropout)


class VeRA(Adapter):
    name = "vera"
    title = "Vector-based Random Matrix Adaptation"
    paper = "Kopiczko et al., VeRA, arXiv 2310.11454 (ICLR 2024)"
    family = "shared"
    count_formula = "r + out"
    peft = "VeraConfig"
    peft_names: ClassVar[dict] = {"d": "d_initial", "dropout": "vera_dropout"}
    peft_seed = "projection_prng_key"
    lr = 1e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(256, ge=1, description="rank of the frozen pair")
        d: float = Field(0.1, gt=0, description="initial value of u")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    tiny: ClassVar = {"r": 16}

    def prepare(self, sites: list[Site]) -> None:
        r = self.config.r
        out, in_ = (max(sizes) for sizes in zip(*(s.shape for s in sites), strict=True))
        A, B = torch.empty(r, in_), torch.empty(out, r)
        if not self.ctx.meta:
            generator = torch.Generator().manual_seed(self.ctx.seed)
            for M in (A, B):
                bound = (6 / M.shape[1]) ** 0.5
                M.uniform_(-bound, bound, generator=generator)
        self.recent = ForwardCache()
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def part(self, site: Site) -> Part:
        return VeRAPart(site, self)

    def peft_state(self) -> dict[str, Tensor]:
        state = {}
        for p in self.parts.values():
            state[f"{p.site.name}.vera_lambda_d.default"] = p.u
            state[f"{p.site.name}.vera_lambda_b.default"] = p.v
        return state
