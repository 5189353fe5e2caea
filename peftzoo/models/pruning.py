"""Pruned base models: before a method is attached, a share of every linear layer's weights becomes zero.

magnitude: the smallest |W| of a layer become zero (Han et al., arXiv 1506.02626).
wanda: the smallest |W_ij| |x_j| of each output row become zero, |x_j| the norm of input j over the
calibration batches; layer after layer, so that a layer's inputs come from the pruned layers before it (Sun et
al., arXiv 2306.11695).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from peftzoo.contract import LINEAR, Context, Site, find_sites
from peftzoo.errors import UserError
from peftzoo.models import probe
from peftzoo.models.pruning_settings import CRITERIA, Pruning

__all__ = ["BATCHES", "CRITERIA", "Pruning", "prune"]

BATCHES = 16
"""Number of calibration batches for wanda."""


def prune(model: nn.Module, how: Pruning, batches: Callable[[], Iterable[dict[str, Tensor]]]) -> float:
    """Set weights of `model` to zero, in place; returns the share of zeros in its linear layers.

    `batches` returns the calibration batches. Raises `UserError` when an N:M group does not divide a layer's
    inputs.
    """
    sites = find_sites(model, ("all",), LINEAR)
    if how.criterion == "magnitude":
        for site in sites:
            _zero_smallest(site, site.weight.abs(), how, per_matrix=not how.group)
    else:
        calibration = [_label_all_tokens(b) for b in itertools.islice(batches(), BATCHES)]
        for _, layer in itertools.groupby(sites, key=lambda s: s.layer):
            for site, norm in _input_norms(model, list(layer), calibration):
                _zero_smallest(site, site.weight.abs() * norm.to(site.weight.dtype), how, per_matrix=False)
    return sparsity(model)


def sparsity(model: nn.Module) -> float:
    """Share of zeros in the weights of the linear layers."""
    weights = [s.weight for s in find_sites(model, ("all",), LINEAR)]
    return sum(int((W == 0).sum()) for W in weights) / sum(W.numel() for W in weights)


def _label_all_tokens(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with its inputs as labels: calibration counts prompt tokens too, unlike the loss."""
    per_token = batch["labels"].shape == batch["input_ids"].shape
    return {**batch, "labels": batch["input_ids"]} if per_token else batch


def _input_norms(
    model: nn.Module, sites: list[Site], batches: list[dict[str, Tensor]]
) -> Iterator[tuple[Site, Tensor]]:
    """Each site with the norm of its inputs over all tokens, (in,)."""
    squares: dict[str, Tensor] = {}

    def collect(site: Site, X: Tensor) -> None:
        squares[site.name] = X.float().square().sum(0) + squares.get(site.name, 0.0)

    source = probe.inputs(Context(model, batches=lambda: batches), sites, len(batches), collect)
    for site in sites:
        yield site, squares[source[site.name]].sqrt()


@torch.no_grad()
def _zero_smallest(site: Site, score: Tensor, pruning: Pruning, per_matrix: bool) -> None:
    """Zero the weights of smallest score (out, in): per matrix, else per row, or per group of a row."""
    out, in_ = score.shape
    if pruning.group and in_ % pruning.group:
        raise UserError(f"--prune: {pruning.group} does not divide the {in_} inputs of {site.name}")
    rows = score.reshape(1, -1) if per_matrix else score.reshape(-1, pruning.group or in_)
    smallest = rows.argsort(dim=1, stable=True)[:, : round(pruning.share * rows.shape[1])]
    keep = torch.ones_like(rows, dtype=torch.bool).scatter_(1, smallest, False).view(out, in_)
    site.weight.mul_(keep)
