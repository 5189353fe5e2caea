"""COLA (Chain of LoRA): train a LoRA, tie it off, start a fresh one on top, and so on.

    y = x (W + s sum_j<i B_j A_j)^T + b + s (x A_i^T) B_i^T        link i of M: A_i (r_i, in), B_i (out, r_i)

Each link trains for an equal share of the run, with a fresh AdamW and a fresh schedule (linear, after a short
warm-up against the spike of a fresh Adam). A_i ~ U(-1/sqrt(in), 1/sqrt(in)), B_i = 0: a new link never
changes the function. r_i = r - (i - 1) `step_down`, at least 1; s = alpha / r. M = 1 is LoRA. The paper's M,
its sites and its distribution of A were not found: here M = 2, all layers, and A as in LoRA.
Trained at a time: r (in + out) per layer; stored: sum_i r_i (in + out).
Paper: Xia et al., arXiv 2401.04151. Different: the paper adds a finished link to W; here it stays a frozen
pair beside W, in the same product as the link in training. The function is the same, nothing is rounded into
a half-precision or quantised W, the base is untouched, and `merge` adds all links at once in fp32.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.kernels import low_rank


class COLAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_), tied = owner.config, site.shape, sum(owner.ranks[:-1])
        self.A = nn.Parameter(self.fresh(0))
        self.B = nn.Parameter(torch.zeros(out, c.r))
        self.register_buffer("tied_A", torch.zeros(tied, in_))
        self.register_buffer("tied_B", torch.zeros(out, tied))
        self.dropout = nn.Dropout(c.dropout)

    def fresh(self, link: int) -> Tensor:
        """The A with which a link starts."""
        in_ = self.site.shape[1]
        return self.owner.ctx.uniform(
            self.owner.config.r, in_, bound=in_**-0.5, key=f"{self.site.name}/{link}"
        )

    @torch.no_grad()
    def tie(self, link: int) -> None:
        """Put the link away and start the next one."""
        r, start = self.owner.ranks[link], sum(self.owner.ranks[:link])
        self.tied_A[start : start + r] = self.A[:r]
        self.tied_B[:, start : start + r] = self.B[:, :r]
        self.A.copy_(self.fresh(link + 1))
        self.B.zero_()

    def pair(self) -> tuple[Tensor, Tensor]:
        """All links as one pair."""
        return torch.cat([self.A, self.tied_A]), torch.cat([self.B, self.tied_B], 1)

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.pair()
        return self.owner.s * B @ A

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, *self.pair(), self.owner.s, self.dropout)


class COLA(Adapter):
    name = "cola"
    title = "Chain of LoRA"
    paper = "Xia et al., Chain of LoRA: Efficient Fine-tuning via Residual Learning, arXiv 2401.04151"
    family = "scheme"
    known_failures: ClassVar = {"check_schedule": "each link has a schedule of its own (schedule=link)"}
    count_formula = "r * (in + out)"
    lr = 3e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(8, ge=1, description="rank of the first link")
        alpha: float = Field(16.0, gt=0, description="scale numerator, s = alpha/r")
        links: int = Field(2, ge=1, description="length M of the chain")
        step_down: int = Field(0, ge=0, description="by how much the rank falls from link to link")
        schedule: Literal["link", "run"] = Field(
            "link", description="learning rate anew for each link, or the run's"
        )
        warmup: float = Field(0.06, ge=0, lt=1, description="share of a link's steps, with schedule=link")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    tiny: ClassVar[dict] = {"r": 2}

    def prepare(self, sites: list[Site]) -> None:
        c = self.config
        self.s, self.now = c.alpha / c.r, (0, 1)
        self.ranks = [max(c.r - i * c.step_down, 1) for i in range(c.links)]

    def part(self, site: Site) -> Part:
        return COLAPart(site, self)

    def link(self, step: int, total: int) -> tuple[int, int, int]:
        """The link that trains in this step, the step after which it began, and its last step."""
        ends = [total * (i + 1) // self.config.links for i in range(self.config.links)]
        i = next(i for i, end in enumerate(ends) if step <= end)
        return i, ends[i - 1] if i else 0, ends[i]

    def optimizer(self, params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
        optimizer.register_step_pre_hook(lambda o, args, kwargs: self.before_step(o, lr))
        return optimizer

    def before_step(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """At the first step of a link forget the moments of the last one; set the link's learning rate."""
        (step, total), own = self.now, optimizer.param_groups[0]
        if not step or self.config.links == 1:
            return
        _, start, end = self.link(step, total)
        if step == start + 1:
            for p in own["params"]:
                optimizer.state.pop(p, None)
        if self.config.schedule == "link":
            t, steps = step - start - 1, end - start
            warm = math.ceil(self.config.warmup * steps)
            own["lr"] = lr * ((t + 1) / (warm + 1) if t < warm else (steps - t) / (steps - warm))

    def after_backward(self, step: int, total: int) -> None:
        self.now = step, total
        r = self.ranks[self.link(step, total)[0]]
        for p in self.parts.values():
            if p.B.grad is not None:
                p.B.grad[:, r:] = 0  # a lower rank: what stays 0 in B has no effect

    def after_step(self, step: int, total: int) -> None:
        i, _, end = self.link(step, total)
        if step == end and i < self.config.links - 1:
            for p in self.parts.values():
                p.tie(i)
