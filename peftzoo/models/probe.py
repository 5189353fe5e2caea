"""Statistics from data before training: the inputs of layers, and the gradients of their weights.

The model runs in eval mode, so that no dropout draws random numbers; every setting is restored afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from peftzoo.contract import Context, Site
from peftzoo.errors import UserError


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, with each module's own mode and each parameter's gradient put back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    grads = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
        for p, needs, grad in grads:
            p.requires_grad_(needs)
            p.grad = grad


def _batches(ctx: Context, limit: int) -> Iterator[dict[str, Tensor]]:
    """Up to `limit` batches of training data. Raises `UserError` when there are none."""
    count = 0
    for count, batch in enumerate(itertools.islice(ctx.batches(), limit), 1):  # noqa: B007
        yield batch
    if not count:
        raise UserError("there is no training data to read: batches() returned no batch")


@torch.no_grad()
def inputs(ctx: Context, sites: list[Site], most: int, see: Callable[[Site, Tensor], None]) -> dict[str, str]:
    """Call see(site, X) with the inputs X (tokens, in) of `sites` on up to `most` batches.

    Padding and tokens whose label is -100 are left out. Sites that read the same tensor (q, k, v) are
    collected once, under the first one. Returns for each site's name the name of the site under which its
    inputs were collected. Raises `UserError` without data.
    """
    source: dict[str, str] = {}
    last: list = [None, ""]  # the last input tensor, and the name of the site that read it
    mask: Tensor | None = None

    def make_hook(site: Site) -> Callable:
        def forward_pre_hook(module, args) -> None:
            x = args[0]
            if x is last[0]:
                source.setdefault(site.name, last[1])
            elif source.setdefault(site.name, site.name) == site.name:
                last[:] = x, site.name
                see(site, x[mask] if x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1]))

        return forward_pre_hook

    handles = [s.module.register_forward_pre_hook(make_hook(s)) for s in sites]
    try:
        with _eval_mode(ctx.model):
            for batch in _batches(ctx, most):
                mask = batch["attention_mask"].bool()
                if batch["labels"].shape == mask.shape:
                    mask = mask & (batch["labels"] != -100)
                ctx.model(**batch)
                last[:] = None, ""
    finally:
        for handle in handles:
            handle.remove()
    return source


def gradients(ctx: Context, sites: list[Site], most: int) -> dict[str, Tensor]:
    """Name of each site -> the mean of dL/dW (out, in) over up to `most` batches, in fp32 on the CPU.

    Each layer's gradient leaves the device as soon as it is computed, so that device memory holds one at a
    time. Raises `UserError` without data, and for a site that the loss does not depend on.
    """
    weights = {id(s.module.weight): s for s in sites}
    total: dict[str, Tensor] = {}

    def accumulate(W: Tensor) -> None:
        site = weights[id(W)]
        G = (W.grad.T if site.transposed else W.grad).float().cpu()
        total[site.name] = G + total[site.name] if site.name in total else G
        W.grad = None

    with _eval_mode(ctx.model), torch.enable_grad():
        for p in ctx.model.parameters():
            p.requires_grad_(id(p) in weights)
        handles = [s.module.weight.register_post_accumulate_grad_hook(accumulate) for s in sites]
        try:
            for n, batch in enumerate(_batches(ctx, most), 1):  # noqa: B007
                ctx.model(**batch).loss.backward()
        finally:
            for handle in handles:
                handle.remove()
    if missing := [s.name for s in sites if s.name not in total]:
        raise UserError(f"the loss does not depend on {missing[0]}: leave it out of targets")
    return {name: G / n for name, G in total.items()}
