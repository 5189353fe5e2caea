"""LoRA: a frozen weight plus a low-rank product.

    y = x W^T + b + s * (drop(x) A^T) B^T        A (r, in), B (out, r), s = alpha / r, or alpha / sqrt(r)

A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0. Trained: r (in + out) per layer. B A is never formed while training.
Papers: Hu et al., arXiv 2106.09685; rank-stabilised scaling: Kalajdzievski, arXiv 2312.03732.

`init` names other starts (`peftzoo/models/low_rank_start.py`). The papers of pissa, olora and lora-ga leave
W - s B0 A0 in the base; here the base is untouched and the adapter adds the difference, zero at the start in
every precision:
    s (B A - B0 A0) = s (B (A - A0) + (B - B0) A0)        one pair of rank 2r
A0 and B0 are saved with A and B.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import low_rank
from peftzoo.models import low_rank_start

IN_PEFT = ("gaussian", "pissa", "olora")
"""Starts that PEFT makes too; its others look at data first. On an export the values are copied anyway."""


class LoRAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        A, B = owner.start(site)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scale = owner.scale
        self.dropout = nn.Dropout(owner.config.dropout)

    def delta(self, W: Tensor) -> Tensor:
        return self.scale * self.B @ self.A

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, self.A, self.B, self.scale, self.dropout)


class SplitPart(LoRAPart):
    """s (B A - B0 A0)"""

    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def pair(self) -> tuple[Tensor, Tensor]:
        """The same as one pair, (2r, in) and (out, 2r)."""
        return torch.cat([self.A - self.A0, self.A0]), torch.cat([self.B, self.B - self.B0], 1)

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.pair()
        return self.scale * B @ A

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, *self.pair(), self.scale, self.dropout)


class LoRA(Adapter):
    name = "lora"
    title = "Low-Rank Adaptation"
    paper = "Hu et al., LoRA, arXiv 2106.09685 (ICLR 2022)"
    family = "low-rank"
    count_formula = "r * (in + out)"
    peft = "LoraConfig"
    peft_names: ClassVar[dict] = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    lr = 3e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=1, description="rank")
        alpha: float = Field(16.0, gt=0, description="scale numerator")
        scaling: Literal["lora", "rslora"] = Field("lora", description="s = alpha/r, or alpha/sqrt(r)")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
        init: Literal["kaiming", "gaussian", "pissa", "olora", "eva", "lora-ga"] = Field(
            "kaiming", description="where A and B start"
        )
        init_batches: int = Field(8, ge=1, description="eva, lora-ga: batches of training data to look at")
        rho: float = Field(1.0, ge=1, description="eva: a layer's rank may grow to rho r (paper: 2)")
        center: bool = Field(True, description="eva: take the mean off the inputs")
        gamma: float = Field(16.0, gt=0, description="lora-ga: smaller means a larger start")

    variants: ClassVar[list] = [{"r": 4, "alpha": 6.0}]

    @property
    def needs_data(self) -> bool:
        return self.config.init in low_rank_start.FROM_DATA

    def prepare(self, sites: list[Site]) -> None:
        c = self.config
        self.scale = c.alpha / (math.sqrt(c.r) if c.scaling == "rslora" else c.r)
        self.ready = low_rank_start.pairs(c, self.ctx, sites, self.scale)

    def start(self, site: Site) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) before training."""
        if site.name in self.ready:
            return self.ready.pop(site.name)
        r, (out, in_) = self.config.r, site.shape
        if self.config.init == "gaussian":
            return self.ctx.normal(r, in_, std=1 / r, key=site.name), torch.zeros(out, r)
        return self.ctx.uniform(r, in_, bound=in_**-0.5, key=site.name), torch.zeros(out, r)

    def part(self, site: Site) -> Part:
        return (SplitPart if self.config.init in low_rank_start.SPLITS else LoRAPart)(site, self)

    def peft_config(self, sites: list[Site]) -> dict:
        c = self.config
        if c.init == "lora-ga":
            raise NotImplementedError("HF PEFT would look at the data again to start as init=lora-ga does")
        options = {"use_rslora": c.scaling == "rslora"}
        if c.init in IN_PEFT:
            options["init_lora_weights"] = c.init
        return super().peft_config(sites) | options

    @classmethod
    def from_peft(cls, config, sites: list[Site]) -> dict:
        options = {"scaling": "rslora" if config.use_rslora else "lora"}
        if config.init_lora_weights in IN_PEFT:
            options["init"] = config.init_lora_weights
        return super().from_peft(config, sites) | options

    def peft_state(self) -> dict[str, Tensor]:
        pairs = {p.site.name: (p.A, p.B) for p in self.parts.values()}
        state = {f"{name}.lora_A.default.weight": A for name, (A, _) in pairs.items()}
        return state | {f"{name}.lora_B.default.weight": B for name, (_, B) in pairs.items()}
