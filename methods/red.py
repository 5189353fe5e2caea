"""RED: a learned scale and shift on the output of the MLP in every layer.

    y = l * (x W^T + b0) + b        l, b (out,)        merged: W' = diag(l) W, b' = l * b0 + b

l = 1, b = 0 at the start: the identity. Trained: 2 out per layer (Llama-2-7B 262,144). Merging gives the
layer a bias where it had none.
Paper: Wu et al., arXiv 2402.15179. Different: its code trains l and b in bf16 for Llama, here both are fp32.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import scaled


class REDPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        out, _ = site.shape
        self.l = nn.Parameter(torch.ones(out))
        self.b = nn.Parameter(torch.zeros(out))

    def delta(self, W: Tensor) -> Tensor:
        return W * (self.l - 1)[:, None]

    def bias(self, b: Tensor | None) -> Tensor:
        return self.b if b is None else self.l * b + self.b

    def forward(self, base, x: Tensor) -> Tensor:
        return scaled(self.site, base, x, self.l, self.b)


class RED(Adapter):
    name = "red"
    title = "Representation Editing"
    paper = (
        "Wu et al., Advancing Parameter Efficiency via Representation Editing, arXiv 2402.15179 (ACL 2024)"
    )
    family = "scaling"
    count_formula = "2 * out"
    lr = 3e-2

    class Config(Config):
        targets: Targets = Field(("down",), description="roles of the linear layers whose output is edited")

    def part(self, site: Site) -> Part:
        return REDPart(site, self)
