"""OFT (in the form of OFTv2): the input of each weight is rotated by a block-diagonal orthogonal matrix.

    y = (x R) W^T + b        R = blockdiag(R_1, .., R_k), R_j (c, c), k c = in        merged: W' = W R^T
    R_j = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4        Q_j skew, from c (c - 1) / 2 trained numbers above its diagonal

The series of 5 `terms` (Cayley-Neumann) is the default; `cayley="exact"` is R_j = (I - Q)(I + Q)^-1, which
turns the other way for the same Q: both as HF PEFT has them. Q = 0: the start is the base. `share` uses one
block for all; `coft` keeps |Q_j| <= eps / sqrt(k) by a projection after each step (HF PEFT projects inside
the forward pass, to the same effect).
Trained: in (c - 1) / 2 per layer, or c (c - 1) / 2 shared; papers that store c^2 per block count in c.
Papers: Qiu et al., arXiv 2306.07280; OFTv2, arXiv 2506.19847 (number from memory). Different: no (in, in)
matrix is built, R of all layers is made at once and again in backward; a size that c does not divide is
refused, where HF PEFT takes another c. HF PEFT's module_dropout, which its layer never applies, is left out.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import ForwardCache, cast, cayley, neumann, remade, rotate_blocks


class OFTPart(Part):
    def __init__(self, site: Site, owner: Adapter, number: int) -> None:
        super().__init__(site, owner)
        self.number = number

    @property
    def q(self) -> Tensor:
        """The trained numbers of this layer, (k, c (c - 1) / 2)."""
        return self.owner.q.split(self.owner.sizes)[self.number]

    def delta(self, W: Tensor) -> Tensor:
        return rotate_blocks(W, self.owner.rotation(self.q).mT) - W

    def forward(self, base, x: Tensor) -> Tensor:
        return base(rotate_blocks(cast(x), self.owner.rotations(self.number)))


class OFT(Adapter):
    name = "oft"
    title = "Orthogonal Finetuning"
    paper = "Qiu et al., OFT, arXiv 2306.07280 (NeurIPS 2023); OFTv2, arXiv 2506.19847"
    family = "orthogonal"
    count_formula = "(1 if share else in // block) * block * (block - 1) // 2"
    peft = "OFTConfig"
    peft_names: ClassVar[dict] = {
        "block": "oft_block_size",
        "share": "block_share",
        "terms": "num_cayley_neumann_terms",
    }
    lr = 3e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        block: int = Field(32, ge=2, description="size c of a block; must divide the inputs of every layer")
        cayley: Literal["neumann", "exact"] = Field("neumann", description="series, or exact transform")
        terms: int = Field(5, ge=4, description="terms of the series")
        share: bool = Field(False, description="one block for all of a layer")
        coft: bool = Field(False, description="keep the rotation small")
        eps: float = Field(6e-5, gt=0, description="largest |Q| times sqrt(k) with coft")

    tiny: ClassVar[dict] = {"block": 8}
    variants: ClassVar[list] = [{"block": 16, "terms": 4}, {"block": 4, "cayley": "exact"}]

    def prepare(self, sites: list[Site]) -> None:
        c = self.config
        for site in sites:
            if (in_ := site.shape[1]) % c.block:
                raise UserError(
                    f'method "oft": block={c.block} does not divide the {in_} inputs of {site.name}'
                )
        rows, columns = torch.triu_indices(c.block, c.block, 1)
        self.register_buffer("above", rows * c.block + columns, persistent=False)
        self.sizes = [1 if c.share else s.shape[1] // c.block for s in sites]
        self.number = {s.name: i for i, s in enumerate(sites)}
        self.q = nn.Parameter(torch.zeros(sum(self.sizes), c.block * (c.block - 1) // 2))
        self.recent = ForwardCache()

    def part(self, site: Site) -> Part:
        return OFTPart(site, self, self.number[site.name])

    def skew(self, q: Tensor) -> Tensor:
        """Q (k, c, c), with q (k, c (c - 1) / 2) row by row above the diagonal."""
        c = self.config.block
        Q = q.new_zeros(len(q), c * c).index_copy(1, self.above, q).view(-1, c, c)
        return Q - Q.mT

    def rotation(self, q: Tensor) -> Tensor:
        """R (k, c, c)"""
        Q = self.skew(q)
        return cayley(Q) if self.config.cayley == "exact" else neumann(Q, self.config.terms)

    def rotations(self, number: int) -> Tensor:
        """R (k, c, c) of one layer; all are made together when the first layer asks or q changed."""
        if torch.compiler.is_compiling():
            return self.rotation(self.q.split(self.sizes)[number])
        if number == 0:
            self.recent.clear()
        make = lambda: remade(self.rotation, self.q).split(self.sizes)  # noqa: E731
        return self.recent.get(self.q, None, make)[number]

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        if not self.config.coft:
            return
        for q in self.q.split(self.sizes):
            norm = 2**0.5 * q.norm(dim=1, keepdim=True)  # of Q, where every number stands twice
            q.mul_((self.config.eps * len(q) ** -0.5 / norm.clamp_min(1e-30)).clamp_max(1))

    def peft_config(self, sites: list[Site]) -> dict:
        neumann = self.config.cayley == "neumann"
        return super().peft_config(sites) | {"r": 0, "use_cayley_neumann": neumann}

    @classmethod
    def from_peft(cls, config, sites: list[Site]) -> dict:
        cayley = "neumann" if config.use_cayley_neumann else "exact"
        return super().from_peft(config, sites) | {"cayley": cayley}

    def peft_state(self) -> dict[str, Tensor]:
        pairs = zip(self.number, self.q.split(self.sizes), strict=True)
        return {f"{name}.oft_R.default.weight": q for name, q in pairs}
