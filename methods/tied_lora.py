"""Tied-LoRA: one trained A and one trained B for all layers of a group, two scaling vectors per layer.

    y = x W^T + b + v * ((u * (drop(x) A^T)) B^T)      A (r, in), B (out, r) shared; u (r,), v (out,) a layer

`share` says which layers have one pair: those of one role (q, k, ...); or, the paper's form, those that read
the same input have one A (q, k and v) and those of one role one B; or all of them. A pair is as large as its
largest layer needs, narrower layers use A[:, :in] and B[:out]. No alpha / r: the paper sets alpha = r.
A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, u = v = 1: the paper's own start was not found, this is LoRA's.
Trained: r in per A, r out per B, r + out per layer (all of Llama-2-7B's q, k, v with `input`, r = 8 and
without scales: 131,072). `scales=false` (TL5 in the paper, else TL6) keeps u and v at 1. With `frozen` the
pair is random and fixed, drawn as VeRA draws it, u = 0.1 and v = 0.
Paper: Renduchintala et al., arXiv 2311.09578. Different: B' = diag(v) B diag(u) is made per layer, r out
products, and applied as LoRA's B, so that no scaling touches an activation.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import ForwardCache, frozen_pair, low_rank

INPUT = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
"""Roles that read the same input."""


class TiedPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, _) = owner.config, site.shape
        if c.scales:
            self.u = nn.Parameter(torch.full((c.r,), 0.1 if c.frozen else 1.0))
            self.v = nn.Parameter(torch.zeros(out) if c.frozen else torch.ones(out))
        self.dropout = nn.Dropout(c.dropout)

    def pair(self) -> tuple[Tensor, Tensor]:
        """This layer's A (r, in) and B (out, r), views of the shared pair."""
        (out, in_), o = self.site.shape, self.owner
        a, b = o.number[self.site.name]
        return getattr(o, f"A{a}")[:, :in_], getattr(o, f"B{b}")[:out]

    def scaled(self) -> tuple[Tensor, Tensor]:
        """A and diag(v) B diag(u): this layer as a plain LoRA."""
        A, B = self.pair()
        return A, self.v[:, None] * B * self.u if self.owner.config.scales else B

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.scaled()
        return B @ A

    def forward(self, base, x: Tensor) -> Tensor:
        o = self.owner
        if o.config.frozen:
            return frozen_pair(self.site, base, x, *self.pair(), self.u, self.v, o.recent, self.dropout)
        return low_rank(self.site, base, x, *self.scaled(), 1.0, self.dropout)


class TiedLoRA(Adapter):
    name = "tied-lora"
    title = "Tied-LoRA: LoRA with Weight Tying"
    paper = "Renduchintala, Konuk and Kuchaiev, Tied-LoRA, arXiv 2311.09578 (NAACL 2024)"
    family = "shared"
    lr = 1e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=1, description="rank")
        share: Literal["role", "input", "all"] = Field(
            "role", description="what layers with one pair have in common; input: one A for q, k and v"
        )
        scales: bool = Field(True, description="train u and v of every layer (TL6), or keep them at 1 (TL5)")
        frozen: bool = Field(False, description="A and B random and fixed, as in VeRA")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

        @model_validator(mode="after")
        def _something_trains(self):
            if self.frozen and not self.scales:
                raise ValueError("frozen=true with scales=false leaves nothing to train")
            return self

    def groups(self, site: Site) -> tuple[str, str]:
        """Names of the A and the B that this layer uses."""
        role, share = site.role, self.config.share
        return ("", "") if share == "all" else (INPUT.get(role, role) if share == "input" else role, role)

    def prepare(self, sites: list[Site]) -> None:
        names = [self.groups(s) for s in sites]
        As, Bs = (list(dict.fromkeys(column)) for column in zip(*names, strict=True))
        self.number = {s.name: (As.index(a), Bs.index(b)) for s, (a, b) in zip(sites, names, strict=True)}
        self.recent = ForwardCache()
        for i in range(len(As)):
            self.share("A", i, max(s.shape[1] for s in sites if self.number[s.name][0] == i))
        for i in range(len(Bs)):
            self.share("B", i, max(s.shape[0] for s in sites if self.number[s.name][1] == i))

    def share(self, side: str, i: int, n: int) -> None:
        """Make A_i (r, n) or B_i (n, r)."""
        c, shape = self.config, (self.config.r, n) if side == "A" else (n, self.config.r)
        if c.frozen:
            M = self.ctx.uniform(*shape, bound=(6 / shape[1]) ** 0.5, key=f"{side}{i}")
            self.register_buffer(f"{side}{i}", M, persistent=False)
        elif side == "A":
            self.register_parameter(
                f"A{i}", nn.Parameter(self.ctx.uniform(*shape, bound=n**-0.5, key=f"A{i}"))
            )
        else:
            self.register_parameter(f"B{i}", nn.Parameter(torch.zeros(shape)))

    def part(self, site: Site) -> Part:
        return TiedPart(site, self)
