"""LoRS: LoRA for a pruned model; the change is masked, so that every zero of the weight stays a zero.

    lors:  y = x (W + s (B A) o M)^T + b         M = 1[W != 0], A (r, in), B (out, r), s = alpha / sqrt(r)
    sqft:  the same with s = alpha / r
    spp:   y = x (W + s (R(P) o p) o W)^T + b    P (r, in), p (out, 1), s = alpha / r

R(P) repeats each row of P out / r times, so r must divide out. M is taken from W when it is needed and never
stored; the changed weight is built again in backward. Merging keeps every zero and any N:M pattern. This
method does not prune: on a dense model M = 1.
lors: B = 0, A = the leading right singular vectors of dL/dW, the mean over `init_batches` batches of training
data, divided by `gamma`. Its gradients are straight-through, without mask and without s: dB = dy^T (x A^T),
dA = (dy B)^T x. sqft, spp: exact gradients; A, P ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, p = 0.
Trained: r (in + out) per layer; spp: r in + out.
Papers: LoRS, Hu et al., arXiv 2501.08582; SQFT's SparsePEFT, Munoz et al., arXiv 2410.03750, without its
quantised form; SPP, Lu et al., arXiv 2405.16057, without dropout, its s taken to be alpha / r.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import check_rank, rebuilt, top_svd
from peftzoo.models import probe


class LoRSPart(Part):
    """One layer of lors and sqft."""

    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_) = owner.config, site.shape
        A = owner.directions.pop(site.name, None)
        self.A = nn.Parameter(owner.ctx.uniform(c.r, in_, bound=in_**-0.5, key=site.name) if A is None else A)
        self.B = nn.Parameter(torch.zeros(out, c.r))
        lors = c.variant == "lors"
        self.straight, self.s = straight if lors else None, c.alpha / (c.r**0.5 if lors else c.r)

    def change(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self.s * (B @ A) * (W != 0)

    def delta(self, W: Tensor) -> Tensor:
        return self.change(W, self.A, self.B)

    def forward(self, base, x: Tensor) -> Tensor:
        return rebuilt(self.site, base, x, self.change, self.A, self.B, straight=self.straight)


def straight(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """What A and B are trained for: neither mask nor s."""
    return x @ A.T.to(x.dtype) @ B.T.to(x.dtype)


class SPPPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_) = owner.config, site.shape
        if out % c.r:
            raise UserError(f'method "lors": r={c.r} does not divide the {out} outputs of {site.name}')
        self.P = nn.Parameter(owner.ctx.uniform(c.r, in_, bound=in_**-0.5, key=site.name))
        self.p = nn.Parameter(torch.zeros(out, 1))
        self.s = c.alpha / c.r

    def change(self, W: Tensor, P: Tensor, p: Tensor) -> Tensor:
        blocks = W.reshape(len(P), -1, W.shape[1])  # (r, out / r, in)
        return (self.s * p.view(len(P), -1, 1) * P[:, None, :] * blocks).view(W.shape)

    def delta(self, W: Tensor) -> Tensor:
        return self.change(W, self.P, self.p)

    def forward(self, base, x: Tensor) -> Tensor:
        return rebuilt(self.site, base, x, self.change, self.P, self.p)


class LoRS(Adapter):
    name = "lors"
    title = "LoRA for Sparse Models"
    paper = "Hu et al., LoRS: Efficient Low-Rank Adaptation for Sparse Large Language Model, arXiv 2501.08582"
    family = "sparse"
    count_formula = "r * in + out if variant == 'spp' else r * (in + out)"
    lr = 1e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(16, ge=1, description="rank, or rows of P")
        alpha: float = Field(
            16.0, gt=0, description="scale numerator: s = alpha/sqrt(r), sqft and spp alpha/r"
        )
        variant: Literal["lors", "sqft", "spp"] = Field("lors", description="which of the three methods")
        init_batches: int = Field(
            16, ge=1, description="lors: batches of training data to take the gradient of"
        )
        gamma: float = Field(1.0, gt=0, description="lors: divides A at the start")

    tiny: ClassVar[dict] = {"r": 4}
    known_failures: ClassVar[dict] = {
        f"check_gradient_of_{what}": "straight-through, without mask and without s"
        for what in ("tensors", "delta")
    }

    @property
    def needs_data(self) -> bool:
        return self.config.variant == "lors"

    def prepare(self, sites: list[Site]) -> None:
        c, ctx = self.config, self.ctx
        self.directions: dict[str, Tensor] = {}
        if c.variant != "lors":
            return
        for site in sites:
            check_rank(site, c.r)
        if ctx.meta or ctx.saved is not None:
            return
        for name, G in probe.gradients(ctx, sites, c.init_batches).items():
            self.directions[name] = top_svd(G, c.r, ctx, f"{name}/A")[2] / c.gamma

    def part(self, site: Site) -> Part:
        return (SPPPart if self.config.variant == "spp" else LoRSPart)(site, self)
