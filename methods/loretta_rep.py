"""LoRETTA_rep: LoRA whose two factors are tensor trains.

    y = x W^T + b + s (drop(x) M_A) M_B     M_A (in, r), M_B (r, out) tensor trains of rank R, s = alpha / r

A train over factors k_1 ... k_d, their product in r, has sum R_(i-1) k_i R_i numbers
(kernels/tensor_train.py); the factors are the paper's for its widths, else ours. Both trains start random,
an entry with standard deviation 1/sqrt(in + r) or 1/sqrt(r + out). As the paper says, the change at the
start is then taken off again (`start=offset`: the start is the base, the rank up to 2 r); its code leaves it
on (`random`). Trained: both trains, and with `norms` all normalisation layers, as published. RoBERTa-base q,
v with R = 5: 27,840 and 38,400. The paper also trains a tensor-train classifier (1,848); here a head is the
engine's. Paper: Yang et al., arXiv 2402.11417. Its Table 10 reverses the factors for M_B, as is done here;
its code does not. The trains are contracted once per forward pass and applied as LoRA's factors; M_A M_B is
never built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets, norm_parameters
from peftzoo.kernels import TensorTrain, low_rank, shape_of


class LoRETTARepPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_), ctx = owner.config, site.shape, owner.ctx
        self.A = TensorTrain(ctx, f"{site.name}/A", (in_, c.r), shape_of(in_, c.r), c.R)
        self.B = TensorTrain(ctx, f"{site.name}/B", (c.r, out), shape_of(out, c.r)[::-1], c.R)
        self.s, self.dropout = c.alpha / c.r, nn.Dropout(c.dropout)
        if c.start == "offset" and not ctx.meta:
            self.register_buffer("A0", self.A.matrix().detach().T, persistent=False)
            self.register_buffer("B0", self.B.matrix().detach().T, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """This layer as a LoRA: (r, in) and (out, r); twice r where the start is taken off."""
        A, B = self.A.matrix().T, self.B.matrix().T
        if self.owner.config.start == "random":
            return A, B
        return torch.cat([A, self.A0]), torch.cat([B, -self.B0], dim=1)

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.factors()
        return self.s * B @ A

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, *self.factors(), self.s, self.dropout)


class LoRETTARep(Adapter):
    name = "loretta-rep"
    title = "Low-Rank Economic Tensor-Train Adaptation, reparameterised"
    paper = "Yang, Zhou, Wong and Zhang, LoRETTA, arXiv 2402.11417 (NAACL 2024)"
    family = "low-rank"
    lr = 1e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=1, description="width between the two trains")
        R: int = Field(5, ge=1, description="rank inside the trains")
        alpha: float = Field(16.0, gt=0, description="scale numerator, s = alpha/r")
        start: Literal["offset", "random"] = Field(
            "offset", description="take the change at the start off, or leave it on"
        )
        norms: bool = Field(True, description="train the normalisation layers too")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    tiny: ClassVar = {"r": 4}

    def unfreeze(self, model: nn.Module) -> Sequence[str]:
        return norm_parameters(model) if self.config.norms else ()

    def part(self, site: Site) -> Part:
        return LoRETTARepPart(site, self)
