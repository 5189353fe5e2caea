"""LoRETTA_adp: a bottleneck adapter behind attention and behind the MLP, its two matrices tensor trains.

    h = x W^T + b      y = h + s (act(h M_down + b_down) M_up + b_up)      M_down (d, m), M_up (m, d)

A train over factors k_1 ... k_d, their product d m, has sum R_(i-1) k_i R_i numbers
(kernels/tensor_train.py). Trains start random with standard deviation 1/sqrt(d + m), biases uniform in
1/sqrt(width), so the start is not the base. Trained: both trains, m + d biases, and with `norms` all
normalisation layers, as published. RoBERTa-base with R = 5: 57,408 and 38,400. The paper also trains a
tensor-train classifier (1,848); here a head is the engine's. Paper: Yang et al., arXiv 2402.11417; act =
relu as in its scripts. Its code for LLaMA puts adapters at gate, up and down, but its count (0.88 M for
Llama-2-7B, R = 8) is that of the two sites here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets, norm_parameters
from peftzoo.kernels import TensorTrain, cast, shape_of

ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu}


class LoRETTAAdpPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (d, _), ctx, name = owner.config, site.shape, owner.ctx, site.name
        shape = shape_of(d, c.m)
        self.down = TensorTrain(ctx, f"{name}/down", (d, c.m), shape, c.R)
        self.up = TensorTrain(ctx, f"{name}/up", (c.m, d), shape[::-1], c.R)
        self.b_down = nn.Parameter(ctx.uniform(c.m, bound=c.m**-0.5, key=f"{name}/b_down"))
        self.b_up = nn.Parameter(ctx.uniform(d, bound=d**-0.5, key=f"{name}/b_up"))
        self.act, self.s = ACTIVATIONS[c.act], c.s

    def forward(self, base, x: Tensor) -> Tensor:
        y = base(x)
        h = cast(y)
        z = self.act(F.linear(h, self.down.matrix().T.to(h.dtype), self.b_down.to(h.dtype)))
        return y + self.s * F.linear(z, self.up.matrix().T.to(h.dtype), self.b_up.to(h.dtype)).to(y.dtype)


class LoRETTAAdp(Adapter):
    name = "loretta-adp"
    title = "Low-Rank Economic Tensor-Train Adaptation, adapters"
    paper = "Yang, Zhou, Wong and Zhang, LoRETTA, arXiv 2402.11417 (NAACL 2024)"
    family = "adapter"
    lr = 1e-2
    mergeable = False
    identity_at_init = False

    class Config(Config):
        targets: Targets = Field(("o", "down"), description="layers with an adapter behind")
        m: int = Field(64, ge=1, description="width of the bottleneck")
        R: int = Field(5, ge=1, description="rank inside the trains")
        act: Literal["relu", "tanh", "gelu", "silu"] = Field("relu", description="activation")
        s: float = Field(1.0, gt=0, description="scale of what the adapter adds")
        norms: bool = Field(True, description="train the normalisation layers too")

    def unfreeze(self, model: nn.Module) -> Sequence[str]:
        return norm_parameters(model) if self.config.norms else ()

    def part(self, site: Site) -> Part:
        return LoRETTAAdpPart(site, self)
