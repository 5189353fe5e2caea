"""QuIC: the output of each weight is rotated by compound matrices of a few tiny orthogonal matrices.

    y = (x W^T) Q^T + b        Q = blockdiag(Q_1, .., Q_N), Q_j (h, h), h = floor(out / N)        W' = Q W
    Q_j = diag(C_1(A), .., C_K(A), I)        A = (I + S)(I - S)^-1 (n, n), S = (P - P^T) / 2

C_k(A) holds the determinants of all k x k minors of A, subsets in lexicographic order; C_1(A) = A, and C_k of
an orthogonal matrix is orthogonal. n is the largest size with sum_k comb(n, k) <= h; the coordinates that
are left pass unchanged. P = 0: the start is the base.
Trained: N n^2 per layer, P being stored in full, which fits the printed sizes (effective N n (n - 1) / 2).
Paper: Raj and Coyle, arXiv 2502.06916 (v1: "Quantum Inspired Adapters"); its code could not be read. It has
square weights only; here Q is on the output side of any shape, as in its W_adapt = Q W. Left out: chained
and offset blocks, other functions than determinants. Different: the minors of order k are expanded along
their first row from those of order k - 1, without determinants; each segment of the output meets its own
compound; backward builds the compounds again.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import cast, cayley, fusable, recomputed


def expansion(n: int, k: int) -> tuple[Tensor, Tensor]:
    """The k-subsets of n (c, k); where each, without its t-th member, stands among the (k - 1)-subsets."""
    place = {s: i for i, s in enumerate(combinations(range(n), k - 1))}
    subsets = list(combinations(range(n), k))
    without = [[place[s[:t] + s[t + 1 :]] for t in range(k)] for s in subsets]
    return torch.tensor(subsets), torch.tensor(without)


def compound(A: Tensor, M: Tensor, subsets: Tensor, without: Tensor) -> Tensor:
    """C_k(A) (N, c, c) from A (N, n, n) and M = C_(k-1)(A): each minor is expanded along its first row."""
    top, rest = A[:, subsets[:, 0]], M[:, without[:, 0]]  # first row of each minor, and the minors below it
    signs = [(-1) ** t for t in range(subsets.shape[1])]
    return sum(s * top[:, :, subsets[:, t]] * rest[:, :, without[:, t]] for t, s in enumerate(signs))


class QuICPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, n = owner.config, owner.size(site)
        self.height = site.shape[0] // c.blocks
        self.P = nn.Parameter(torch.zeros(1 if c.share else c.blocks, n, n))

    def compounds(self, P: Tensor) -> list[Tensor]:
        """C_1(A), .., C_K(A), each (N, c, c)."""
        A = cayley((P.mT - P) / 2)
        found = [A]
        for k in range(2, min(self.owner.config.order, P.shape[-1]) + 1):
            found.append(compound(A, found[-1], *self.owner.table(P.shape[-1], k)))
        return found

    def turn(self, z: Tensor, P: Tensor) -> Tensor:
        """z Q^T, (..., out)."""
        blocks, h = self.owner.config.blocks, self.height
        Z, left = z[..., : blocks * h].unflatten(-1, (blocks, h)), z[..., blocks * h :]
        done, start = [], 0
        for C in self.compounds(P):
            segment = Z[..., start : start + C.shape[-1]]
            done.append(torch.einsum("...ni,nji->...nj", segment, C.to(z.dtype).expand(blocks, -1, -1)))
            start += C.shape[-1]
        return torch.cat([torch.cat([*done, Z[..., start:]], -1).flatten(-2), left], -1)

    def delta(self, W: Tensor) -> Tensor:
        return self.turn(W.T, self.P).T - W

    def forward(self, base, x: Tensor) -> Tensor:
        b = self.site.bias
        if fusable(self.site, x):
            z = F.linear(cast(x), self.site.weight.to(cast(x).dtype))
        else:
            z = base(x) if b is None else base(x) - b
        y = recomputed(self.turn, z, self.P)
        return y if b is None else y + b.to(y.dtype)


class QuIC(Adapter):
    name = "quic"
    title = "Quantum-Inspired Compound Adapters"
    paper = "Raj and Coyle, QuIC: Quantum-Inspired Compound Adapters, arXiv 2502.06916"
    family = "orthogonal"
    lr = 2e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        blocks: int = Field(8, ge=1, description="number N of blocks")
        order: int = Field(2, ge=1, le=4, description="largest order K of the compounds")
        share: bool = Field(False, description="one orthogonal matrix for all blocks of a layer")

    tiny: ClassVar[dict] = {"blocks": 2}
    variants: ClassVar[list] = [{"blocks": 3, "order": 2, "share": True}]

    def size(self, site: Site) -> int:
        """n, the size of the orthogonal matrices of a layer."""
        c, out = self.config, site.shape[0]
        h, n = out // c.blocks, 1
        while sum(comb(n + 1, k) for k in range(1, c.order + 1)) <= h:
            n += 1
        if n < 2:
            raise UserError(f'method "quic": {out} outputs of {site.name} in {c.blocks} blocks: lower blocks')
        return n

    def prepare(self, sites: list[Site]) -> None:
        for n in {self.size(s) for s in sites}:
            for k in range(2, min(self.config.order, n) + 1):
                for name, t in zip(("subsets", "without"), expansion(n, k), strict=True):
                    self.register_buffer(f"{name}_{n}_{k}", t, persistent=False)

    def table(self, n: int, k: int) -> tuple[Tensor, Tensor]:
        """`expansion(n, k)`, shared by the layers of one size."""
        return getattr(self, f"subsets_{n}_{k}"), getattr(self, f"without_{n}_{k}")

    def part(self, site: Site) -> Part:
        return QuICPart(site, self)
