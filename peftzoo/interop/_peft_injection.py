"""HF PEFT working on a model: its layers are in the tree inside a `with`, and out again afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftzoo.errors import UserError

REFUSALS = (ValueError, TypeError, RuntimeError, AssertionError, AttributeError, KeyError)
"""What PEFT raises for a config or a model that it does not take."""


def library() -> Any:
    """The package `peft`. Raises `UserError` where it is not installed."""
    try:
        import peft
    except ImportError:
        raise UserError("HF PEFT is not installed: pip install 'peftzoo[peft]'") from None
    return peft


def make_config(cls: type, **values: Any) -> Any:
    """An object of one of PEFT's config classes. Raises `UserError` with PEFT's own words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(**values)
    except REFUSALS as error:
        raise UserError(f"HF PEFT refuses: {_line(error)}") from error


@contextmanager
def with_peft_layers(model: nn.Module, config: Any, *, may_edit: bool = False) -> Iterator[Any]:
    """PEFT's model around `model` inside a `with`; afterwards tree and weights are as they were.

    Raises `UserError` with PEFT's own words when it refuses the config or the model, and when it changes base
    weights (the starts called PiSSA and OLoRA do) unless it `may_edit` them.
    """
    before = dict(model.named_modules())
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    matrices = {n: m for n, m in before.items() if is_matrix(m) and not m.weight.is_meta}
    sums = {n: _sum(m) for n, m in matrices.items()}
    odd = any(k.startswith("init") and isinstance(v, str) for k, v in vars(config).items())
    copies = {n: m.weight.data.clone() for n, m in matrices.items()} if odd else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                made = library().get_peft_model(model, config)
            except REFUSALS as error:
                raise UserError(f"HF PEFT refuses: {_line(error)}") from error
        changed = [n for n, m in matrices.items() if _sum(m) != sums[n]]
        if changed and not may_edit:
            raise UserError(
                f"with these options HF PEFT changes the base weights of {changed[0]}: choose others"
            )
        yield made
    finally:
        swap(before)
        vars(model).pop("peft_config", None)
        for n, p in model.named_parameters():
            p.requires_grad_(trained[n])
        for n, W in copies.items():
            matrices[n].weight.data = W


def is_matrix(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) == 2


def _sum(module: nn.Module) -> float:
    return float(module.weight.detach().sum(dtype=torch.float64))


def swap(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Put these modules at their names below the root, which has the empty name; returns what was there.

    A parent is looked up among `modules` first, so that a replaced one is not searched for its old children.
    """
    out = {"": modules[""]}
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if name:
            children = (modules.get(parent) or modules[""].get_submodule(parent))._modules
            if children[last] is not module:
                out[name], children[last] = children[last], module
    return out


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__
