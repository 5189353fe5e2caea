"""Initial values of a low-rank pair A, B from the weight, its inputs or its gradient (`init` of LoRA).

    pissa     A = diag(sqrt(S_r / s)) V_r^T,  B = U_r diag(sqrt(S_r / s)),  W = U S V^T       arXiv 2404.02948
    olora     A = R[:r],  B = Q[:, :r],  W = Q R                                              arXiv 2406.01775
    lora-ga   A = c V[:, :r]^T,  B = c U[:, r:2r],  dL/dW = U S V^T,  c^2 = sqrt(out) / gamma       2407.05000
    eva       A = the first right singular vectors of the layer's inputs X,  B = 0            arXiv 2410.07170

lora-ga: HF PEFT multiplies B by S and leaves A orthonormal; this is the paper's form, whose first step
follows the best rank-2r part of the gradient. eva: the inputs are centred, as in both code bases
(`center=False`: as in the theory). With rho > 1 each layer offers round(r rho) directions, and those N r are
taken that explain most of their layer's variance, over all N layers: ranks differ and may be zero, s stays
alpha / r. On the meta device they are counted as r each. A fixed number of batches is read, where eva's codes
wait for convergence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftzoo.contract import Config, Context, Site
from peftzoo.errors import UserError
from peftzoo.kernels import check_rank, top_qr, top_svd
from peftzoo.models import probe

Pair = tuple[Tensor, Tensor]
FROM_DATA = ("eva", "lora-ga")
"""Starts that read training data."""
SPLITS = ("pissa", "olora", "lora-ga")
"""Starts with B A != 0, which the adapter subtracts again, so that training starts at the base model."""
EXTRA = 10
"""Singular vectors beyond k that `Directions` carries from batch to batch."""


def pairs(c: Config, ctx: Context, sites: list[Site], s: float) -> dict[str, Pair]:
    """Name of each site -> A (r, in), B (out, r); empty where the start is random, and on the meta device.

    `c` has the options `init`, `r`, `init_batches`, `rho`, `center` and `gamma`; s is the factor on B A.
    Raises `UserError` when r is too large for a layer or, for eva, for the number of tokens.
    """
    if c.init not in (*FROM_DATA, *SPLITS):
        return {}
    for site in sites:
        check_rank(site, c.r)
    if ctx.meta:
        return {}
    if ctx.saved is not None:
        return {site.name: _zeros_of_saved_rank(c, ctx, site) for site in sites}
    starts = {"pissa": _pissa, "olora": _olora, "lora-ga": _lora_ga, "eva": _eva}
    result = starts[c.init](c, ctx, sites, s)
    return {name: (A.contiguous(), B.contiguous()) for name, (A, B) in result.items()}


def _zeros_of_saved_rank(c: Config, ctx: Context, site: Site) -> Pair:
    """A pair of zeros with the saved rank, to be filled from the file."""
    A = ctx.saved.get(f"parts.{site.name.replace('.', '/')}.A")
    r, (out, in_) = c.r if A is None else len(A), site.shape
    return torch.zeros(r, in_), torch.zeros(out, r)


def _pissa(c: Config, ctx: Context, sites: list[Site], s: float) -> dict[str, Pair]:
    result = {}
    for site in sites:
        U, S, Vt = top_svd(site.weight, c.r, ctx, site.name)
        root = (S / s).sqrt()
        result[site.name] = root[:, None] * Vt, U * root
    return result


def _olora(c: Config, ctx: Context, sites: list[Site], s: float) -> dict[str, Pair]:
    return {site.name: top_qr(site.weight, c.r)[::-1] for site in sites}


def _lora_ga(c: Config, ctx: Context, sites: list[Site], s: float) -> dict[str, Pair]:
    result = {}
    for site in sites:
        check_rank(site, 2 * c.r)
    for name, G in probe.gradients(ctx, sites, c.init_batches).items():
        U, _, Vt = top_svd(G, 2 * c.r, ctx, name)
        scale = len(G) ** 0.25 / c.gamma**0.5
        result[name] = scale * Vt[: c.r], scale * U[:, c.r :]
    return result


@dataclass
class Directions:
    """The leading k right singular vectors of all rows so far, batch by batch: incremental PCA.

    Ross et al., Incremental Learning for Robust Visual Tracking, IJCV 2008. From batch to batch `EXTRA` more
    are carried along, so that truncation loses little.
    """

    k: int
    center: bool
    n: int = 0
    mean: Tensor | float = 0.0
    energy: Tensor | float = 0.0
    """Sum of squares of all rows so far, about the mean when they are centred."""
    S: Tensor | None = None
    Vt: Tensor | None = None

    def see(self, X: Tensor, ctx: Context, key: str) -> None:
        """Update with X (rows, in); `ctx` and `key` give the random sketch of a large SVD its seed."""
        X, n = X.float(), len(X)
        rows = [X]
        if self.center:
            mean = X.mean(0)
            shift = (self.n * n / (self.n + n)) ** 0.5 * (self.mean - mean)
            rows = [X - mean, shift[None]]
            self.mean = (self.n * self.mean + n * mean) / (self.n + n)
        self.energy = self.energy + sum(R.square().sum() for R in rows)
        if self.S is not None:
            rows.append(self.S[:, None] * self.Vt)
        M = torch.cat(rows)
        _, self.S, self.Vt = top_svd(M, min(self.k + EXTRA, *M.shape), ctx, f"{key}/{self.n}")
        self.n += n


def _eva(c: Config, ctx: Context, sites: list[Site], s: float) -> dict[str, Pair]:
    k = {site.name: min(round(c.r * c.rho), site.shape[1]) for site in sites}
    directions: dict[str, Directions] = {}

    def collect(site: Site, X: Tensor) -> None:
        if len(X):
            directions.setdefault(site.name, Directions(k[site.name], c.center)).see(X, ctx, site.name)

    source = probe.inputs(ctx, sites, c.init_batches, collect)
    if short := [name for name in k if len(directions[source[name]].S) < c.r]:
        raise UserError(f"eva saw fewer than r={c.r} tokens in {short[0]}: raise init_batches")
    shares = {name: (d := directions[source[name]]).S[: d.k].square() / d.energy for name in k}
    counts = {name: c.r for name in shares}
    if c.rho > 1:
        layers = [name for name, share in shares.items() for _ in share]
        best = torch.cat(list(shares.values())).argsort(descending=True, stable=True)[: c.r * len(sites)]
        chosen = [layers[i] for i in best.tolist()]
        counts = {name: chosen.count(name) for name in shares}
    A = {name: directions[source[name]].Vt[:n] for name, n in counts.items()}
    return {site.name: (A[site.name], torch.zeros(site.shape[0], len(A[site.name]))) for site in sites}
