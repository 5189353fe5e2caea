"""Uni-LoRA: every entry of every A and B comes from one trained vector by a fixed isometric projection.

    theta_D[i] = theta[idx(i)] / sqrt(c_idx(i))        c_j = how many i have idx(i) = j
    y = x W^T + b + (drop(x) A^T) B^T                  A (r, in), B (out, r) are slices of theta_D, no alpha/r

theta_D (D,) lists A, then B (row-major), of each layer in the model's order; D = r sum(in + out). idx is
balanced: each j occurs floor(D/d) or ceil(D/d) times, shuffled with the run's seed, so P^T P = I. theta ~
U(-bound, bound): A and B start non-zero, so the start is not exactly the base. Trained: d, for any model. A
saved adapter draws idx again from its seed when loaded.
Paper: Li et al., arXiv 2506.00799; its text puts B before A and draws idx independently, its code is as here.
Different: theta is scaled before the gather (d products, not D), one gather serves all layers of a forward
pass, idx is int32, and the backward is a sum over presorted segments, deterministic on every device.
`projection` has other maps to compare with: `local`, each layer with a share of theta of its own, and the
dense maps `fastfood` and `gaussian` (peftzoo/kernels/projections.py), which keep the norm on average only.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import DENSE, ForwardCache, balanced, local, low_rank


class _Spread(torch.autograd.Function):
    """theta (d,) -> theta_D (D,). Saves nothing for backward, so its graph may be walked more than once."""

    @staticmethod
    def forward(ctx, theta: Tensor, owner: UniLoRA) -> Tensor:
        ctx.owner = owner
        return (theta * owner.inv_sqrt_count).index_select(0, owner.idx)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        o = ctx.owner
        by_entry = grad.index_select(0, o.order)  # (D,), equal idx side by side
        return torch.segment_reduce(by_entry, "sum", lengths=o.lengths) * o.inv_sqrt_count, None


class UniLoRAPart(Part):
    def __init__(self, site: Site, owner: Adapter, number: int) -> None:
        super().__init__(site, owner)
        self.number = number
        self.dropout = nn.Dropout(owner.config.dropout)

    def pair(self) -> tuple[Tensor, Tensor]:
        """This layer's A (r, in) and B (out, r)."""
        (out, in_), (a, b) = self.site.shape, self.owner.pair(self.number)
        return a.view(-1, in_), b.view(out, -1)

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.pair()
        return B @ A

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, *self.pair(), 1.0, self.dropout)


class UniLoRA(Adapter):
    name = "unilora"
    title = "Uni-LoRA: One Vector is All You Need"
    paper = "Li et al., Uni-LoRA, arXiv 2506.00799 (NeurIPS 2025)"
    family = "shared"
    count_formula = "model: d or min(max(r * (sum_in + sum_out) // 4, 1), 524288)"
    peft = "UniLoraConfig"
    peft_names: ClassVar[dict] = {
        "d": "theta_d_length",
        "bound": "init_theta_d_bound",
        "dropout": "unilora_dropout",
    }
    redrawn = True
    lr = 1e-2
    identity_at_init = False

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(4, ge=1, description="rank")
        d: int | None = Field(None, ge=1, description="length of theta; by default D/4, at most 524,288")
        bound: float = Field(0.02, gt=0, description="theta starts uniform in (-bound, bound)")
        projection: Literal["uniform", "local", "fastfood", "gaussian"] = Field(
            "uniform", description="how theta reaches A and B; local: a share of theta per layer"
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    variants: ClassVar[list] = [{"r": 2, "d": 300}]

    def prepare(self, sites: list[Site]) -> None:
        c = self.config
        self.sizes = [n for s in sites for n in (c.r * s.shape[1], c.r * s.shape[0])]  # of A, B, A, B ...
        self.number = {s.name: i for i, s in enumerate(sites)}
        D = sum(self.sizes)
        d = c.d or min(max(D // 4, 1), 524_288)
        if d > D:
            raise UserError(f'method "unilora": d={d} exceeds the D={D} entries of these layers: lower d')
        self.theta = nn.Parameter(self.ctx.uniform(d, bound=c.bound, key="theta"))
        self.recent, self.dense = ForwardCache(), None
        if c.projection in DENSE:
            self.dense = DENSE[c.projection](self.ctx, D, d)
        elif c.projection == "local":
            self.use(local(self.ctx, {s.name: c.r * sum(s.shape) for s in sites}, d), d)
        else:
            self.use(balanced(self.ctx, D, d), d)

    def use(self, idx: Tensor, d: int) -> None:
        """Set the projection: idx (D,), every value of 0..d-1 present."""
        count = torch.empty(d, dtype=torch.int64) if idx.is_meta else torch.bincount(idx, minlength=d)
        order = torch.argsort(idx, stable=True)
        tensors = (idx.int(), order.int(), count, count.float().rsqrt())
        for name, t in zip(("idx", "order", "lengths", "inv_sqrt_count"), tensors, strict=True):
            self.register_buffer(name, t, persistent=False)
        self.recent.clear()

    def pair(self, number: int) -> tuple[Tensor, Tensor]:
        """Entries of A and B of one layer; theta_D is new whenever the first layer asks or theta changed."""
        if torch.compiler.is_compiling() and self.dense is None:  # the compiler fuses the gathers itself
            start, sizes = sum(self.sizes[: 2 * number]), self.sizes[2 * number : 2 * number + 2]
            idx = self.idx[start : start + sum(sizes)]
            return (self.theta * self.inv_sqrt_count).index_select(0, idx).split(sizes)
        if number == 0:
            self.recent.clear()
        spread = self.dense or (lambda theta: _Spread.apply(theta, self))
        make = lambda: spread(self.theta).split(self.sizes)  # noqa: E731
        return self.recent.get(self.theta, None, make)[2 * number : 2 * number + 2]

    def part(self, site: Site) -> Part:
        return UniLoRAPart(site, self, self.number[site.name])

    def peft_config(self, sites: list[Site]) -> dict:
        if self.dense is not None:
            raise NotImplementedError(f"HF PEFT gathers theta and has no {self.config.projection} projection")
        return super().peft_config(sites) | {"theta_d_length": len(self.theta), "save_indices": True}

    def peft_state(self) -> dict[str, Tensor]:
        return {"unilora_theta_d.default": self.theta}

    def peft_frozen(self) -> dict[str, Tensor]:
        state, idx = {}, self.idx.split(self.sizes)
        for name, i in self.number.items():
            for letter, entries in zip("AB", idx[2 * i : 2 * i + 2], strict=True):
                shape = (self.config.r, -1) if letter == "A" else (-1, self.config.r)
                scales = self.inv_sqrt_count[entries].view(shape)
                state[f"{name}.unilora_indices_{letter}.default"] = entries.view(shape)
                state[f"{name}.unilora_scales_{letter}.default"] = scales
        return state
