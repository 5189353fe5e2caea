"""HiRA: the weight is multiplied, entry by entry, by one plus a low-rank product.

    y = x (W * (1 + B A))^T + b        A (r, in), B (out, r), * entry by entry

A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: the identity. The change W * (B A) has up to rank(W) r ranks. Trained:
r (in + out) per layer (Llama-2-7B, q, k, v, up, down, r = 32: 56,098,816). There is no scale, and the change
is small because W is: a larger learning rate than LoRA's. Entries of W that are zero stay zero.
Paper: Huang et al., ICLR 2025 (OpenReview TwJrTz9cRS). Different: W * (1 + B A) is made for one product and
made again in backward, instead of kept, and merged in fp32, since bf16 rounds a change below 2^-9 away;
dropout, which the official code ignores, acts on the input of the change, as in HF PEFT.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import active, cast, in_place, rebuilt, recomputed


def change(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W * (B A), (out, in)"""
    return W * (B @ A)


class HiRAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        r, (out, in_) = owner.config.r, site.shape
        self.A = nn.Parameter(owner.ctx.uniform(r, in_, bound=in_**-0.5, key=site.name))
        self.B = nn.Parameter(torch.zeros(out, r))
        self.dropout = nn.Dropout(owner.config.dropout)

    def delta(self, W: Tensor) -> Tensor:
        return change(W, self.A, self.B)

    def forward(self, base, x: Tensor) -> Tensor:
        if not active(self.dropout):
            return rebuilt(self.site, base, x, change, self.A, self.B)
        W, X = self.site.weight, self.dropout(cast(x))
        product = lambda X, A, B: F.linear(X, change(W.to(A.dtype), A, B).to(X.dtype))  # noqa: E731
        return in_place(self.site, base(x), recomputed(product, X, self.A, self.B))


class HiRA(Adapter):
    name = "hira"
    title = "Hadamard High-Rank Adaptation"
    paper = "Huang et al., HiRA: Parameter-Efficient Hadamard High-Rank Adaptation, ICLR 2025"
    family = "structured"
    count_formula = "r * (in + out)"
    peft = "HiraConfig"
    peft_names: ClassVar[dict] = {"dropout": "hira_dropout"}
    lr = 1e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(32, ge=1, description="rank of the product")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the change")

    tiny: ClassVar[dict] = {"r": 3}

    def part(self, site: Site) -> Part:
        return HiRAPart(site, self)

    def peft_state(self) -> dict[str, Tensor]:
        return {f"{p.site.name}.hira_{n}.default": getattr(p, n) for p in self.parts.values() for n in "AB"}
