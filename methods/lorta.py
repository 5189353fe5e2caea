"""LoRTA: the changes of q, k, v and o in all layers are slices of one tensor in a CP decomposition of rank r.

    dW = s A diag(C_h[h] * C_m[m] * C_l[l]) B, side by side for the heads h     y = x W^T + b + drop(x) dW^T
    A (d, r) hidden, B (r, d_h) inside a head, C_h (H, r) heads, C_l (L, r) layers, C_m (4, r) matrices

s = alpha / r. B = 0, A ~ U(-1/sqrt(r), 1/sqrt(r)), C ~ U(-sqrt(6/r), sqrt(6/r)); with init_scale = 1 C as A.
Trained: r (d + d_h + H + L + 4) for the whole model (Llama-2-7B, r = 8: 34,336).
Paper: Hounie et al., arXiv 2410.04060. Its code puts the heads on a layer's output features in one place and
on its input features in another, for all four matrices alike; `heads_on` has both, and `natural`: output for
q, k, v and input for o, the one that fits models whose heads together are not as wide as the model.
Different: no dense dW. The factors of a layer, (out, r) and (r, in), are made from the five and applied as
LoRA's. Ours: with fewer key than query heads, k and v use the first rows of C_h; fused layers are cut up.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import low_rank

MATRICES = {"q": "q", "k": "k", "v": "v", "qkv": "qkv", "o": "o"}
"""Role of a layer -> the matrices in it, in the order of its rows."""


class LoRTAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, matrices = owner.config, MATRICES[site.role]
        self.m = [owner.matrices.index(m) for m in matrices]
        self.heads = [owner.H if m in "qo" else owner.kv for m in matrices]
        self.layer = owner.layers.index(site.layer)
        self.on_output = c.heads_on == "output" or (c.heads_on == "natural" and site.role != "o")
        self.s, self.dropout = c.alpha / c.r, nn.Dropout(c.dropout)
        sides = (
            (sum(self.heads) * owner.d_h, owner.d)
            if self.on_output
            else (len(self.m) * owner.d, owner.H * owner.d_h)
        )
        if site.shape != sides:
            raise UserError(
                f'method "lorta": {site.name} is {site.shape}, heads on the {c.heads_on} make {sides}; '
                "try --set heads_on=natural"
            )

    def factors(self) -> tuple[Tensor, Tensor]:
        """This layer as a LoRA: (r, in) and (out, r)."""
        o = self.owner
        C_h = o.C_h * o.C_l[self.layer]
        if self.on_output:
            rows = [C_h[:n] * o.C_m[m] for m, n in zip(self.m, self.heads, strict=True)]  # (heads, r) each
            C = torch.stack(rows, 1).flatten(0, 1) if o.head_by_head else torch.cat(rows)
            return o.A.T, (C[:, None, :] * o.B.T).flatten(0, 1)
        return (C_h[:, None, :] * o.B.T).flatten(0, 1).T, (o.C_m[self.m][:, None, :] * o.A).flatten(0, 1)

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.factors()
        return self.s * B @ A

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, *self.factors(), self.s, self.dropout)


class LoRTA(Adapter):
    name = "lorta"
    title = "Low-Rank Tensor Adaptation"
    paper = "Hounie, Kanatsoulis, Tandon and Ribeiro, LoRTA, arXiv 2410.04060"
    family = "shared"
    count_formula = "model: r * (width + head_dim + heads + blocks); roles: r * (3 if role == 'qkv' else 1)"
    lr = 2e-2

    class Config(Config):
        targets: Targets = Field(("q", "k", "v", "o"), description="matrices of attention to adapt")
        r: int = Field(32, ge=1, description="rank of the tensor")
        alpha: float = Field(32.0, gt=0, description="scale numerator, s = alpha/r")
        init_scale: float = Field(0.0, ge=0, description="0: C starts in sqrt(6/r); 1: in sqrt(1/r)")
        heads_on: Literal["natural", "output", "input"] = Field(
            "natural", description="features that the heads divide; natural: output, input for o"
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    tiny: ClassVar[dict] = {"r": 8}

    def prepare(self, sites: list[Site]) -> None:
        if odd := [s.role for s in sites if s.role not in MATRICES]:
            raise UserError(f'method "lorta" adapts q, k, v and o, not "{odd[0]}": change targets')
        c, model = self.config, self.ctx.model.config.get_text_config()
        self.d, self.H = model.hidden_size, model.num_attention_heads
        self.kv = getattr(model, "num_key_value_heads", None) or self.H
        self.d_h = getattr(model, "head_dim", None) or self.d // self.H
        self.head_by_head = model.model_type == "gpt_neox"  # fused layer: q, k, v of each head
        self.layers = sorted({s.layer for s in sites})
        self.matrices = sorted({m for s in sites for m in MATRICES[s.role]}, key="qkvo".index)
        wide = (6 / (1 + 5 * c.init_scale**2) / c.r) ** 0.5
        self.A = nn.Parameter(self.ctx.uniform(self.d, c.r, bound=c.r**-0.5, key="A"))
        self.B = nn.Parameter(torch.zeros(c.r, self.d_h))
        for name, n in (("C_h", self.H), ("C_l", len(self.layers)), ("C_m", len(self.matrices))):
            self.register_parameter(name, nn.Parameter(self.ctx.uniform(n, c.r, bound=wide, key=name)))

    def part(self, site: Site) -> Part:
        return LoRTAPart(site, self)
