"""RoAd: pairs of a layer's outputs are rotated and scaled.

    h = x W^T + b,   y = c1 * h + c2 * turn(h)        turn(h)_p = -h_q, turn(h)_q = h_p for a pair (p, q)

c1 = a cos t, c2 = a sin t. `road_1`: one a and one t per pair (out in all); `road_2`: one a and one t per
output (2 out); `road_4`: two of each per output, a1 cos t1 and a2 sin t2 (4 out). a = 1, t = 0: the identity.
Merged: W' = R W, b' = R b, the same formula on the rows of W.
Trained: 2 n per layer, n = out / 2, out or 2 out (LLaMA-7B, all layers, road_1: 1,359,872).
Paper: Liao and Monz, arXiv 2409.00119. Different: pairs lie half a `group` apart, as in HF PEFT; the paper's
neighbours are group = 2. The pairing belongs to the adapter. The base's output is kept for backward, nothing
else as wide; products are in fp32, where a half-precision c1 would forget a small angle.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError


def turn(h: Tensor, group: int) -> Tensor:
    """Every pair (p, q) of the last dimension becomes (-q, p)."""
    p, q = h.unflatten(-1, (-1, 2, group // 2)).unbind(-2)
    return torch.stack((-q, p), -2).flatten(-3)


class _Rotated(torch.autograd.Function):
    """y = c1 * h + c2 * turn(h):  dh = c1 * dy - turn(c2 * dy),  dc1 = sum dy * h,  dc2 = sum dy * turn(h)"""

    @staticmethod
    def forward(ctx, h, c1, c2, group):
        ctx.group = group
        ctx.save_for_backward(h, c1, c2)
        return (c1 * h).addcmul_(c2, turn(h, group)).to(h.dtype)

    @staticmethod
    def backward(ctx, dy):
        h, c1, c2 = ctx.saved_tensors
        dh = (c1 * dy).sub_(turn(c2 * dy, ctx.group)).to(h.dtype) if ctx.needs_input_grad[0] else None
        products = (dy * t for t in (h, turn(h, ctx.group)))  # (..., out)
        dc1, dc2 = (t.reshape(-1, len(c1)).sum(0, dtype=c1.dtype) for t in products)
        return dh, dc1, dc2, None


class RoAdPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        out, self.group = site.shape[0], owner.config.group
        if out % self.group:
            raise UserError(
                f'method "road": group={self.group} does not divide the {out} outputs of {site.name}: '
                "choose an even divisor"
            )
        n = {"road_1": out // 2, "road_2": out, "road_4": 2 * out}[owner.config.variant]
        self.a, self.t = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def scales(self) -> tuple[Tensor, Tensor]:
        """c1, c2 (out,)"""
        variant, width = self.owner.config.variant, self.group
        a, t = self.a, self.t
        if variant == "road_1":  # both of a pair have the same
            a, t = (v.view(-1, 1, width // 2).expand(-1, 2, -1).flatten() for v in (a, t))
        if variant == "road_4":  # in each group those of c1, then those of c2
            (a1, a2), (t1, t2) = (v.view(-1, 2, width).unbind(1) for v in (a, t))
            return (a1 * t1.cos()).flatten(), (a2 * t2.sin()).flatten()
        return a * t.cos(), a * t.sin()

    def rotated(self, h: Tensor) -> Tensor:
        return _Rotated.apply(h, *self.scales(), self.group)

    def delta(self, W: Tensor) -> Tensor:
        return self.rotated(W.T).T - W

    def bias(self, b: Tensor | None) -> Tensor | None:
        return None if b is None else self.rotated(b)

    def forward(self, base, x: Tensor) -> Tensor:
        return self.rotated(base(x))


class RoAd(Adapter):
    name = "road"
    title = "RoAd: 2D Rotary Adaptation"
    paper = "Liao and Monz, 3-in-1: 2D Rotary Adaptation, arXiv 2409.00119 (NeurIPS 2024)"
    family = "orthogonal"
    count_formula = "out * (1 if variant == 'road_1' else 2 if variant == 'road_2' else 4)"
    peft = "RoadConfig"
    peft_names: ClassVar[dict] = {"group": "group_size"}
    lr = 5e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers whose output is rotated")
        variant: Literal["road_1", "road_2", "road_4"] = Field(
            "road_1", description="out, 2 out or 4 out trained numbers per layer"
        )
        group: int = Field(32, ge=2, multiple_of=2, description="the two of a pair lie half of this apart")

    tiny: ClassVar[dict] = {"group": 8}
    variants: ClassVar[list] = [{"group": 2}]

    def part(self, site: Site) -> Part:
        return RoAdPart(site, self)

    def peft_state(self) -> dict[str, Tensor]:
        state = {f"{p.site.name}.road_theta.default": p.t for p in self.parts.values()}
        return state | {f"{p.site.name}.road_alpha.default": p.a for p in self.parts.values()}
