"""HF PEFT's layers in a model's module tree: injected inside a `with` block, removed after it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftzoo.errors import UserError, not_installed

REFUSALS = (ValueError, TypeError, RuntimeError, AssertionError, AttributeError, KeyError)
"""The exceptions that PEFT raises for a config or a model that it does not support."""


def import_peft() -> Any:
    """The package `peft`. Raises `UserError` with the pip command where it is not installed."""
    try:
        import peft
    except ImportError:
        raise not_installed("peft") from None
    return peft


def make_config(cls: type, **values: Any) -> Any:
    """An instance of one of PEFT's config classes. Raises `UserError` with PEFT's message when it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(**values)
    except REFUSALS as error:
        raise UserError(f"HF PEFT refuses: {_one_line(error)}") from error


@contextmanager
def with_peft_layers(model: nn.Module, config: Any, *, may_edit: bool = False) -> Iterator[Any]:
    """A `PeftModel` around `model` inside the `with`; afterwards module tree and weights are restored.

    Raises `UserError` with PEFT's message when it refuses the config or the model, and when it changes base
    weights (the initialisations PiSSA and OLoRA do) unless `may_edit` allows that.
    """
    original_modules = dict(model.named_modules())
    requires_grad = {n: p.requires_grad for n, p in model.named_parameters()}
    matrices = {n: m for n, m in original_modules.items() if has_matrix_weight(m) and not m.weight.is_meta}
    sums = {n: _weight_sum(m) for n, m in matrices.items()}
    named_init = any(k.startswith("init") and isinstance(v, str) for k, v in vars(config).items())
    copies = {n: m.weight.data.clone() for n, m in matrices.items()} if named_init else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                peft_model = import_peft().get_peft_model(model, config)
            except REFUSALS as error:
                raise UserError(f"HF PEFT refuses: {_one_line(error)}") from error
        changed = [n for n, m in matrices.items() if _weight_sum(m) != sums[n]]
        if changed and not may_edit:
            raise UserError(
                f"with these options HF PEFT changes the base weights of {changed[0]}: choose other options"
            )
        yield peft_model
    finally:
        swap_modules(original_modules)
        vars(model).pop("peft_config", None)
        for n, p in model.named_parameters():
            p.requires_grad_(requires_grad[n])
        for n, W in copies.items():
            matrices[n].weight.data = W


def has_matrix_weight(module: nn.Module) -> bool:
    """Whether the module has a weight of two dimensions."""
    return getattr(getattr(module, "weight", None), "ndim", 0) == 2


def _weight_sum(module: nn.Module) -> float:
    return float(module.weight.detach().sum(dtype=torch.float64))


def swap_modules(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Put the modules at their names below the root, which has the empty name; returns those they replace.

    A parent is looked up among `modules` first, because the tree may still hold a parent that is replaced.
    """
    replaced = {"": modules[""]}
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if name:
            children = (modules.get(parent) or modules[""].get_submodule(parent))._modules
            if children[last] is not module:
                replaced[name], children[last] = children[last], module
    return replaced


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__
