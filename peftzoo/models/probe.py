"""Looking at data before training: what flows into the layers, and the gradients of their weights.

The model runs in eval mode, so that no dropout draws random numbers; every setting is put back afterwards.
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
def _still(model: torch.nn.Module) -> Iterator[None]:
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


def _batches(ctx: Context, most: int) -> Iterator[dict[str, Tensor]]:
    seen = 0
    for seen, batch in enumerate(itertools.islice(ctx.batches(), most), 1):  # noqa: B007
        yield batch
    if not seen:
        raise UserError("there is no training data to look at: batches() gives none")


@torch.no_grad()
def inputs(ctx: Context, sites: list[Site], most: int, see: Callable[[Site, Tensor], None]) -> dict[str, str]:
    """Show what flows into `sites` on up to `most` batches: see(site, X), X (tokens, in) without padding.

    Labels of -100 leave their tokens out too. Layers that read the same tensor (q, k, v) are shown once.
    Returns for each site's name the name of the site that was shown for it.
    """
    shown: dict[str, str] = {}
    last: list = [None, ""]  # the tensor that was read last, and by whom
    mask: Tensor | None = None

    def hook(site: Site) -> Callable:
        def look(module, args) -> None:
            x = args[0]
            if x is last[0]:
                shown.setdefault(site.name, last[1])
            elif shown.setdefault(site.name, site.name) == site.name:
                last[:] = x, site.name
                see(site, x[mask] if x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1]))

        return look

    handles = [s.module.register_forward_pre_hook(hook(s)) for s in sites]
    try:
        with _still(ctx.model):
            for batch in _batches(ctx, most):
                mask = batch["attention_mask"].bool()
                if batch["labels"].shape == mask.shape:
                    mask = mask & (batch["labels"] != -100)
                ctx.model(**batch)
                last[:] = None, ""
    finally:
        for handle in handles:
            handle.remove()
    return shown


def gradients(ctx: Context, sites: list[Site], most: int) -> dict[str, Tensor]:
    """Name of each site -> the mean of dL/dW (out, in) over up to `most` batches, in fp32 on the CPU.

    Each layer's gradient leaves the device as soon as it is there, so that memory holds one at a time.
    """
    weights = {id(s.module.weight): s for s in sites}
    total: dict[str, Tensor] = {}

    def collect(W: Tensor) -> None:
        site = weights[id(W)]
        G = (W.grad.T if site.transposed else W.grad).float().cpu()
        total[site.name] = G + total[site.name] if site.name in total else G
        W.grad = None

    with _still(ctx.model), torch.enable_grad():
        for p in ctx.model.parameters():
            p.requires_grad_(id(p) in weights)
        handles = [s.module.weight.register_post_accumulate_grad_hook(collect) for s in sites]
        try:
            for n, batch in enumerate(_batches(ctx, most), 1):  # noqa: B007
                ctx.model(**batch).loss.backward()
        finally:
            for handle in handles:
                handle.remove()
    if missing := [s.name for s in sites if s.name not in total]:
        raise UserError(f"the loss does not depend on {missing[0]}: leave it out of targets")
    return {name: G / n for name, G in total.items()}
