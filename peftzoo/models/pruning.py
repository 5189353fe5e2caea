"""Pruned base models: before a method is attached, a share of every linear layer's weights becomes zero.

magnitude: the smallest |W| of a layer go (Han et al., arXiv 1506.02626).
wanda: the smallest |W_ij| |x_j| of each output row go, |x_j| the norm of input j over the calibration
batches; layer after layer, so that a layer sees what the pruned ones before it give (Sun et al.,
arXiv 2306.11695).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftzoo.contract import LINEAR, Context, Site, find_sites
from peftzoo.errors import UserError, unknown
from peftzoo.models import probe

HOW = ("magnitude", "wanda")
BATCHES = 16
"""Calibration batches for wanda."""


@dataclass(frozen=True)
class Pruning:
    """What goes: a share of the weights, or all but `keep` of every `group` neighbours in a row."""

    how: str
    share: float
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> Pruning:
        """`magnitude:0.5`, `wanda:0.5`, or N:M patterns such as `wanda:2:4` (N of M go)."""
        how, _, amount = text.partition(":")
        if how not in HOW:
            raise unknown("pruning", how, HOW)
        if found := re.fullmatch(r"(\d+):(\d+)", amount):
            n, m = int(found[1]), int(found[2])
            share, group = (n / m, m) if m else (0.0, 0)
        else:
            share, group = (float(amount) if re.fullmatch(r"0?\.\d+", amount) else 0.0), 0
        if not 0 < share < 1:
            raise UserError(f'--prune "{text}": write {how}:0.5 (a share between 0 and 1) or {how}:2:4')
        return cls(how, share, group)


def prune(model: nn.Module, how: Pruning, batches: Callable[[], Iterable[dict[str, Tensor]]]) -> float:
    """Set weights of `model` to zero, in place; returns the share of zeros in its linear layers."""
    sites = find_sites(model, ("all",), LINEAR)
    if how.how == "magnitude":
        for site in sites:
            _zero(site, site.weight.abs(), how, whole=not how.group)
    else:
        kept = [_all_tokens(b) for b in itertools.islice(batches(), BATCHES)]
        for _, layer in itertools.groupby(sites, key=lambda s: s.layer):
            for site, norm in _norms(model, list(layer), kept):
                _zero(site, site.weight.abs() * norm.to(site.weight.dtype), how, whole=False)
    return sparsity(model)


def sparsity(model: nn.Module) -> float:
    """Share of zeros in the weights of the linear layers."""
    weights = [s.weight for s in find_sites(model, ("all",), LINEAR)]
    return sum(int((W == 0).sum()) for W in weights) / sum(W.numel() for W in weights)


def _all_tokens(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Calibration looks at prompts too, whatever the loss looks at."""
    fits = batch["labels"].shape == batch["input_ids"].shape
    return {**batch, "labels": batch["input_ids"]} if fits else batch


def _norms(
    model: nn.Module, sites: list[Site], batches: list[dict[str, Tensor]]
) -> Iterator[tuple[Site, Tensor]]:
    """Each site with the norm of its inputs, (in,)."""
    squares: dict[str, Tensor] = {}

    def see(site: Site, X: Tensor) -> None:
        squares[site.name] = X.float().square().sum(0) + squares.get(site.name, 0.0)

    shown = probe.inputs(Context(model, batches=lambda: batches), sites, len(batches), see)
    for site in sites:
        yield site, squares[shown[site.name]].sqrt()


@torch.no_grad()
def _zero(site: Site, score: Tensor, how: Pruning, whole: bool) -> None:
    """Zero the entries of smallest score (out, in): of the whole matrix, of each row, of each group."""
    out, in_ = score.shape
    if how.group and in_ % how.group:
        raise UserError(f"--prune: {how.group} does not divide the {in_} inputs of {site.name}")
    rows = score.reshape(1, -1) if whole else score.reshape(-1, how.group or in_)
    least = rows.argsort(dim=1, stable=True)[:, : round(how.share * rows.shape[1])]
    keep = torch.ones_like(rows, dtype=torch.bool).scatter_(1, least, False).view(out, in_)
    site.weight.mul_(keep)
