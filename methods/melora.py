"""MELoRA: n small LoRAs side by side, each from one group of input features to one group of outputs.

    y = x W^T + b + s * concat_i((drop_i(x_i) A_i^T) B_i^T)     A (n, r, in/n), B (n, out/n, r), s = alpha / r

The weight change is block diagonal, blockdiag(s B_1 A_1, ..., s B_n A_n), of rank up to n r. A_i ~ U(-k, k)
with k = 1/sqrt(in/n), B = 0. Trained: r (in + out) per layer, whatever n (RoBERTa-base q, v, r = 1: 36,864;
Llama-2-7B q, v, r = 1: 524,288). n must divide in and out; the groups are contiguous.

Paper: Ren et al., arXiv 2402.17263; n = 2, r = 8, alpha = 16 is its GLUE script. Different: all groups are in
one batched product, not a loop over slices, and share one r (the code takes a list); merging works.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import active, cast, fusable


def groups(x: Tensor, n: int) -> Tensor:
    """(..., features) -> (n, tokens, features / n), a view where x is contiguous."""
    return x.reshape(-1, n, x.shape[-1] // n).transpose(0, 1)


class _Blocks(torch.autograd.Function):
    """y = x W^T + b + s concat_i((x_i A_i^T) B_i^T), added in place. Saved for backward: x, s x_i A_i^T."""

    @staticmethod
    def forward(ctx, x, W, b, A, B, s):
        y = F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))
        H = torch.bmm(groups(x, len(A)), A.mT.to(x.dtype)).mul_(s)  # (n, tokens, r)
        groups(y, len(A)).baddbmm_(H, B.mT.to(x.dtype))
        ctx.s = s
        ctx.save_for_backward(x, W, A, B, H)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B, H = ctx.saved_tensors
        D = groups(dy, len(A))  # (n, tokens, out / n)
        dH = torch.bmm(D, B.to(D.dtype)).mul_(ctx.s)  # (n, tokens, r)
        dA = torch.bmm(dH.mT, groups(x, len(A))).to(A.dtype)
        dB = torch.bmm(D.mT, H).to(B.dtype)
        dX = None
        if ctx.needs_input_grad[0]:
            dX = torch.mm(dy.reshape(-1, dy.shape[-1]), W.to(dy.dtype)).view(x.shape)
            groups(dX, len(A)).baddbmm_(dH, A.to(dH.dtype))
        return dX, None, None, dA, dB, None


class MELoRAPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_) = owner.config, site.shape
        if in_ % c.n or out % c.n:
            raise UserError(
                f"{site.name}: n={c.n} does not divide its {in_} inputs and {out} outputs: choose another n"
            )
        bound = (c.n / in_) ** 0.5
        self.A = nn.Parameter(owner.ctx.uniform(c.n, c.r, in_ // c.n, bound=bound, key=site.name))
        self.B = nn.Parameter(torch.zeros(c.n, out // c.n, c.r))
        self.scale = c.alpha / c.r
        self.dropout = nn.Dropout(c.dropout)

    def delta(self, W: Tensor) -> Tensor:
        return torch.block_diag(*(self.scale * self.B @ self.A))

    def forward(self, base, x: Tensor) -> Tensor:
        if not active(self.dropout) and fusable(self.site, x):
            return _Blocks.apply(cast(x), self.site.weight, self.site.bias, self.A, self.B, self.scale)
        y, X = base(x), cast(self.dropout(x))
        H = torch.bmm(groups(X, len(self.A)), self.A.mT.to(X.dtype))  # (n, tokens, r)
        Y = torch.bmm(H, (self.scale * self.B).mT.to(X.dtype))  # (n, tokens, out / n)
        return y + Y.transpose(0, 1).reshape(y.shape)


class MELoRA(Adapter):
    name = "melora"
    title = "Mini-Ensemble Low-Rank Adapters"
    paper = "Ren et al., MELoRA, arXiv 2402.17263 (ACL 2024)"
    family = "low-rank"
    count_formula = "r * (in + out)"
    lr = 3e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        n: int = Field(2, ge=1, description="number of small LoRAs side by side; divides inputs and outputs")
        r: int = Field(8, ge=1, description="rank of each")
        alpha: float = Field(16.0, gt=0, description="scale numerator, s = alpha/r")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    def part(self, site: Site) -> Part:
        return MELoRAPart(site, self)
