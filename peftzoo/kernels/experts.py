"""A pool of LoRA experts: a top-k router and the weighted sums of the experts that it picks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftzoo.contract import Context
from peftzoo.errors import UserError

MOMENTUM, EPS = 0.1, 1e-5
"""Of the BatchNorm in the router, as in torch.nn.BatchNorm1d."""


def keep_top(p: Tensor, k: int) -> Tensor:
    """The k largest of each row of p (L, n), scaled to sum 1; the others 0."""
    top, indices = p.topk(k, dim=-1)
    return torch.zeros_like(p).scatter(-1, indices, top / top.sum(-1, keepdim=True))


def imbalance(load: Tensor) -> Tensor:
    """Squared coefficient of variation of load (n,): 0 when all are equal, n - 1 when one takes all.

    The load-balancing loss of Shazeer et al., arXiv 1701.06538.
    """
    return load.var(correction=0) / load.mean().square()


def mixed(G: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums of the experts' factors: sum_j G_j A_j (L, r, in) and sum_j G_j B_j (L, out, r).

    Gates G (L, n), A (n, r, in), B (n, out, r).
    """
    return torch.tensordot(G, A, 1), torch.tensordot(G, B, 1)


def mixed_products(G: Tensor, A: Tensor, B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """sum_j G_j B_j A_j over the k experts of largest gate as one pair, (L, k r, in) and (L, out, k r)."""
    g, j = G.topk(k, dim=-1)
    return A[j].flatten(1, 2), (g[..., None, None] * B[j]).transpose(1, 2).flatten(2)


class Router(nn.Module):
    """keep_top(softmax(R2 SiLU(BatchNorm(R1 t)) + b2), k): rows t (L, width) -> gates (L, n).

    BatchNorm uses its running statistics in training too, which `follow` updates: in a batch of a few rows,
    all from one text, the batch's own mean would remove what distinguishes this text from another. Raises
    `UserError` when k > n.
    """

    def __init__(self, width: int, hidden: int, n: int, k: int, ctx: Context) -> None:
        super().__init__()
        if k > n:
            raise UserError(f"k={k} experts of a pool of n={n}: lower k or raise n")
        self.k = k
        self.R1 = nn.Parameter(ctx.uniform(hidden, width, bound=width**-0.5, key="router/R1"))
        self.gain, self.shift = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.zeros(hidden))
        self.R2 = nn.Parameter(ctx.uniform(n, hidden, bound=hidden**-0.5, key="router/R2"))
        self.b2 = nn.Parameter(torch.zeros(n))
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("square", torch.ones(hidden))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, T: Tensor) -> tuple[Tensor, Tensor]:
        """Gates (L, n) and the inputs (L, hidden) of BatchNorm, for `follow`."""
        rows = F.linear(T, self.R1)
        X = (rows - self.mean) * (self.square - self.mean.square() + EPS).rsqrt()
        logits = F.linear(F.silu(X * self.gain + self.shift), self.R2, self.b2)
        return keep_top(logits.softmax(-1), self.k), rows.detach()

    @torch.no_grad()
    def follow(self, rows: Tensor) -> None:
        """Update the running statistics with rows (L, hidden); a single row, without variance, is ignored."""
        if len(rows) > 1:
            rate = (1 / (self.steps + 1)).clamp_min(MOMENTUM)
            self.mean.lerp_(rows.mean(0), rate)
            self.square.lerp_(rows.square().mean(0), rate)
            self.steps += 1
