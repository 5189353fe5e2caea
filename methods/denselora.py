"""DenseLoRA: an encoder and a decoder shared over depth, between them one dense r x r matrix per layer.

    y = x W^T + b + s act(act(drop(x) E^T) M^T D^T)     E (r, in), D (out, r) per role, M (r, r) per layer

s = alpha / r. E and M ~ U(-1/sqrt(fan in), 1/sqrt(fan in)), D = 0: the start is the base, as long as act(0)
= 0, and only D has a gradient at first. Trained: r (in + out) per role + r^2 per layer (Llama-3-8B at q, k,
v, up, down, r = 16: 925,696). Two activations, so it cannot be merged, unless act = identity: then dW = s D
M E.
Paper: Mu et al., arXiv 2505.23808; act is left open there and GELU in the code, whose published state
creates no M. Dropout acts on x, behind the encoder and behind the decoder. Different: the decoder is
computed again in backward, so that only x and (T, r) are kept, not the (T, out) that its activation would
need.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Context, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import cast, in_place, recomputed

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda t: t}


class DenseLoRAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c = owner.config
        self.M = nn.Parameter(owner.ctx.uniform(c.r, c.r, bound=c.r**-0.5, key=site.name))
        self.s, self.dropout = c.alpha / c.r, nn.Dropout(c.dropout)

    def pair(self) -> tuple[Tensor, Tensor]:
        """The encoder (r, in) and the decoder (out, r) of this layer's role."""
        i = self.owner.number[self.site.name]
        return self.owner.E[i], self.owner.D[i]

    def delta(self, W: Tensor) -> Tensor:
        E, D = self.pair()
        if self.owner.config.act != "identity":
            raise UserError('method "denselora" is a weight change with act=identity only')
        return self.s * D @ self.M @ E

    def decode(self, h: Tensor, M: Tensor, D: Tensor) -> Tensor:
        """(..., r) -> (..., out)"""
        act = ACTIVATIONS[self.owner.config.act]
        z = F.linear(self.dropout(act(h)), M.to(h.dtype))
        return self.s * self.dropout(act(F.linear(z, D.to(h.dtype))))

    def forward(self, base, x: Tensor) -> Tensor:
        (E, D), X = self.pair(), cast(self.dropout(x))
        h = F.linear(X, E.to(X.dtype))
        dropping = self.dropout.p > 0 and self.training
        z = self.decode(h, self.M, D) if dropping else recomputed(self.decode, h, self.M, D)
        return in_place(self.site, base(x), z)


class DenseLoRA(Adapter):
    name = "denselora"
    title = "Dense Low-Rank Adaptation"
    paper = "Mu et al., DenseLoRA, arXiv 2505.23808 (ACL 2025)"
    family = "shared"
    count_formula = "r ** 2; roles: r * (in + out)"
    lr = 3e-3
    mergeable = False

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(16, ge=1, description="width between encoder and decoder")
        alpha: float = Field(32.0, gt=0, description="scale numerator, s = alpha/r")
        act: Literal["gelu", "silu", "tanh", "identity"] = Field(
            "gelu", description="activation behind encoder and decoder; identity can be merged"
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout in three places")

    def bind(self, ctx: Context) -> None:
        super().bind(ctx)
        self.mergeable = self.config.act == "identity"

    def prepare(self, sites: list[Site]) -> None:
        r, groups = self.config.r, [(s.role, *s.shape) for s in sites]
        names = list(dict.fromkeys(groups))
        self.number = {s.name: names.index(g) for s, g in zip(sites, groups, strict=True)}
        draw = self.ctx.uniform
        self.E = nn.ParameterList(
            draw(r, i, bound=i**-0.5, key=f"{role}/{out}x{i}") for role, out, i in names
        )
        self.D = nn.ParameterList(torch.zeros(out, r) for _, out, _ in names)

    def part(self, site: Site) -> Part:
        return DenseLoRAPart(site, self)
