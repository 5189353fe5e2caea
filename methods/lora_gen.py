"""LoRA-Gen: a model reads the task's description once and mixes a pool of LoRA experts into a LoRA per layer.

    T = cloud([description ; <meta> x L])[-L:]              T (L, c): a row per adapted layer of the edge
    G = keep_k(softmax(R2 SiLU(BatchNorm(R1 T)) + b2))      G (L, n): k gates above 0, of sum 1
    y = x W^T + b + s (x A^T) B^T,   A = sum_j G_lj A_j,   B = sum_j G_lj B_j      in layer l, s = alpha / r
    loss + aux (std / mean)^2 of the experts' mean gates

The edge runs without the description, and merged it costs what the base costs. Expert j has an A_j (r, in)
and a B_j (out, r) per role; layers differ in their gates alone. What a description gives is kept until a
tensor changes; only training asks the cloud in every pass. Trained: n r (in + out) per role (TinyLlama,
r = 16, n = 8: 2,949,120), router h (c + n + 2) + n, <meta> c, LoRA of rank `cloud_r` on q, v of the cloud.
Paper: Xiao et al., arXiv 2506.11638. It does not settle whether factors are mixed (`mix=factors`, as its
formula reads) or products sum_j G_lj B_j A_j of rank k r (`mix=products`), nor the start: here A as in LoRA,
B = 0, <meta> the mean of the vocabulary. Different: the cloud is by default the base itself, without parts;
BatchNorm uses running statistics in training too (`kernels/experts.py`); gates ignore autocast, so that the
merged model has the same experts.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import MODEL, Adapter, Config, Part, Site, Targets, find_sites
from peftzoo.errors import UserError
from peftzoo.kernels import Router, imbalance, low_rank, mixed, mixed_products
from peftzoo.models.text_encoder import SELF, TextEncoder


class Written(NamedTuple):
    """What a description gives: gates (L, n), the router's rows, and per role A and B of all layers."""

    gates: Tensor
    rows: Tensor
    pairs: dict[str, tuple[Tensor, Tensor]]


class Before(Part):
    """Around the whole model: all is written before the first layer, and outside any checkpointing."""

    def forward(self, base, *args: Any, **kwargs: Any) -> Any:
        self.owner.now = self.owner.written(anew=True)
        try:
            return base(*args, **kwargs)
        finally:
            self.owner.now = None


class MixedPart(Part):
    def pair(self) -> tuple[Tensor, Tensor]:
        o, layer = self.owner, self.owner.layers.index(self.site.layer)
        A, B = (o.now or o.written()).pairs[self.site.role]
        return A[layer], B[layer]

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.pair()
        return self.owner.s * B @ A

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, *self.pair(), self.owner.s, self.owner.dropout)


class LoRAGen(Adapter):
    name = "lora-gen"
    title = "LoRA-Gen: specialising a model by generated LoRA"
    paper = "Xiao et al., LoRA-Gen, arXiv 2506.11638 (ICML 2025)"
    family = "generation"
    lr = 5e-3
    described = True

    class Config(Config):
        targets: Targets = Field(("gate", "up", "down"), description="roles that the experts adapt")
        n: int = Field(8, ge=1, description="experts in the pool")
        k: int = Field(2, ge=1, description="experts in a layer's mixture")
        r: int = Field(16, ge=1, description="rank of an expert")
        alpha: float = Field(16.0, gt=0, description="scale numerator, s = alpha/r")
        mix: Literal["factors", "products"] = Field("factors", description="mix A and B, or their products")
        aux: float = Field(0.01, ge=0, description="weight of the load balance")
        hidden: int = Field(64, ge=1, description="width h of the router")
        cloud: str = Field(SELF, description="self, or a text model: alias, Hub id or relative folder")
        cloud_r: int = Field(8, ge=1, description="rank of the cloud's LoRA")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input (paper: 0.05)")
        description: str = Field("", description="what the cloud reads; a run fills in its task's")

    tiny: ClassVar[dict] = {"n": 4, "r": 2, "hidden": 8, "cloud_r": 2}

    def sites(self, model: nn.Module) -> list[Site]:
        return [*find_sites(model, (), MODEL), *super().sites(model)]

    def prepare(self, sites: list[Site]) -> None:
        c, linear = self.config, sites[1:]
        self.s, self.dropout = c.alpha / c.r, nn.Dropout(c.dropout)
        self.layers, shapes = sorted({s.layer for s in linear}), {s.role: s.shape for s in linear}
        if odd := [s for s in linear if s.shape != shapes[s.role]]:
            raise UserError(f"{odd[0].name} is {odd[0].shape}, others differ: an expert fits one shape")
        self.roles, self.A, self.B = list(shapes), nn.ParameterList(), nn.ParameterList()
        for role, (out, in_) in shapes.items():
            self.A.append(self.ctx.uniform(c.n, c.r, in_, bound=in_**-0.5, key=f"experts/{role}"))
            self.B.append(torch.zeros(c.n, out, c.r))
        lora = {"r": c.cloud_r, "alpha": c.cloud_r, "targets": "q,v"}
        self.cloud = TextEncoder(c.cloud, self.ctx, "lora", **lora)
        self.router = Router(self.cloud.width, c.hidden, c.n, c.k, self.ctx)
        self.now, self.kept, self.runs, self.trained = None, {}, 0, list(self.parameters())
        self.describe(c.description)

    def describe(self, text: str) -> None:
        self.config = self.config.model_copy(update={"description": text})
        self.register_buffer("ids", self.cloud.tokens(text), persistent=False)

    def part(self, site: Site) -> Part:
        return (Before if site.kind == MODEL else MixedPart)(site, self)

    def written(self, anew: bool = False) -> Written:
        """What the description gives now; with gradients, `anew` makes a fresh graph."""
        key = None if (grad := torch.is_grad_enabled()) else self.config.description
        state = self.config.description, [p._version for p in self.trained]
        if (anew and grad) or self.kept.get(key, (None,))[0] != state:
            self.kept[key] = state, self.write()
        return self.kept[key][1]

    def write(self) -> Written:
        """Ask the cloud."""
        c, self.runs = self.config, self.runs + 1
        with torch.autocast(self.ids.device.type, enabled=False):
            G, rows = self.router(self.cloud(self.ids, len(self.layers)))
            mix = mixed if c.mix == "factors" else lambda *pool: mixed_products(*pool, c.k)
            pools = zip(self.roles, self.A, self.B, strict=True)
            return Written(G, rows, {role: mix(G, A, B) for role, A, B in pools})

    def penalty(self) -> Tensor:
        return self.config.aux * imbalance(self.written().gates.mean(0))

    def after_step(self, step: int, total: int) -> None:
        if None in self.kept:
            self.router.follow(self.kept[None][1].rows)

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with nothing written: no graph travels with it."""
        return vars(self) | {"now": None, "kept": {}}
