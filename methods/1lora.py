"""1LoRA: a rank-1 change whose input side is the plain sum of the features; one trained vector per layer.

    y = x W^T + b0 + u b,  u = sum_j x_j        dW = b 1^T        b (out,), u a number per token

b = 0 at the start. No scale, nothing random. Trained: out per layer (RoBERTa-base, all six layers of a
block: 82,944). With `norms` the normalisation layers are trained too, the best variant in the paper's
ablations.
Paper: Quercia et al., arXiv 2503.08333, whose listing this is. Different: only u is kept for backward, and
the gradient of x is W's plus one number per token. u is summed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets, norm_parameters
from peftzoo.kernels import cast, fusable, in_place


def total(x: Tensor) -> Tensor:
    """sum_j x_j, at least in fp32, (..., 1)"""
    return x.sum(-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


class _Summed(torch.autograd.Function):
    """y = x W^T + b0 + u b. Saved for backward: u (T, 1)."""

    @staticmethod
    def forward(ctx, x, W, b0, b):
        u = total(x).view(-1, 1).to(x.dtype)
        y = F.linear(x, W.to(x.dtype), None if b0 is None else b0.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(u, b[None].to(y.dtype))
        ctx.save_for_backward(W, b, u)
        return y

    @staticmethod
    def backward(ctx, dy):
        W, b, u = ctx.saved_tensors
        D, dx = dy.reshape(-1, dy.shape[-1]), None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(D, W.to(D.dtype)).add_(torch.mv(D, b.to(D.dtype))[:, None])
            dx = dx.view(*dy.shape[:-1], -1)
        return dx, None, None, torch.mm(u.T, D)[0].to(b.dtype)


class OneLoRAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        self.b = nn.Parameter(torch.zeros(site.shape[0]))

    def delta(self, W: Tensor) -> Tensor:
        return self.b[:, None].expand_as(W)

    def forward(self, base, x: Tensor) -> Tensor:
        if fusable(self.site, x):
            return _Summed.apply(cast(x), self.site.weight, self.site.bias, self.b)
        return in_place(self.site, base(x), total(x) * self.b)


class OneLoRA(Adapter):
    name = "1lora"
    title = "Summation Compression for Very Low-Rank Adaptation"
    paper = "Quercia et al., 1LoRA, arXiv 2503.08333"
    family = "low-rank"
    count_formula = "out; model: norms * all_norms"
    lr = 3e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        norms: bool = Field(False, description="train the normalisation layers too")

    def unfreeze(self, model: nn.Module) -> Sequence[str]:
        return norm_parameters(model) if self.config.norms else ()

    def part(self, site: Site) -> Part:
        return OneLoRAPart(site, self)
