"""(IA)^3: learned element-wise scales on keys, values and the hidden layer of the MLP.

    k, v:  y = l * (x W^T + b)      l (out,)         merged: W' = diag(l) W, b' = l * b
    down:  y = (l * x) W^T + b      l (in,)          merged: W' = W diag(l)

l = 1 at the start: the identity. Trained: out or in per layer (Llama-2-7B with k, v, down: 614,400).
Paper: Liu et al., arXiv 2205.05638. Keys are scaled before the rotary embedding, as HF PEFT does. Where q, k
and v are one layer (GPT-2, Phi-3) the scale covers all of it, queries included: that layer is the site.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import scaled, scaled_input


class IA3Part(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        self.input_side = site.role in owner.config.feedforward
        out, in_ = site.shape
        self.l = nn.Parameter(torch.ones(in_ if self.input_side else out))

    def delta(self, W: Tensor) -> Tensor:
        return W * (self.l - 1 if self.input_side else (self.l - 1)[:, None])

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.input_side else self.l * b

    def forward(self, base, x: Tensor) -> Tensor:
        return (scaled_input if self.input_side else scaled)(self.site, base, x, self.l)


class IA3(Adapter):
    name = "ia3"
    title = "Infused Adapter by Inhibiting and Amplifying Inner Activations"
    paper = "Liu et al., Few-Shot Parameter-Efficient Fine-Tuning, arXiv 2205.05638 (NeurIPS 2022)"
    family = "scaling"
    count_formula = "in if has(feedforward, role) else out"
    peft = "IA3Config"
    lr = 5e-2

    class Config(Config):
        targets: Targets = Field(("k", "v", "down"), description="roles of the linear layers to scale")
        feedforward: Targets = Field(("down",), description="roles among them scaled on the input side")

    variants: ClassVar[list] = [{"targets": "all"}]

    def part(self, site: Site) -> Part:
        return IA3Part(site, self)

    def peft_config(self, sites: list[Site]) -> dict:
        inner = [s.name for s in sites if s.role in self.config.feedforward]
        return super().peft_config(sites) | {"feedforward_modules": inner}

    @classmethod
    def from_peft(cls, config, sites: list[Site]) -> dict:
        inner = {s.role for s in sites if s.name in config.feedforward_modules}
        return {"feedforward": tuple(sorted(inner)) or cls.Config().feedforward}

    def peft_state(self) -> dict[str, Tensor]:
        return {
            f"{p.site.name}.ia3_l.default": p.l[None] if p.input_side else p.l[:, None]
            for p in self.parts.values()
        }
