"""What a method may not change in the process: torch's functions and settings, peftzoo, random states."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

PATCHABLE = (
    torch, torch.nn, torch.nn.functional, torch.nn.init, torch.linalg, torch.autograd, torch.optim,
    torch.random, torch.Tensor, nn.Module, nn.Parameter, nn.Linear, nn.Dropout, torch.optim.Optimizer,
    torch.optim.AdamW, torch.optim.SGD,
)  # fmt: skip
"""Modules and classes whose functions are compared."""

Functions = dict[str, Any]


def settings() -> dict[str, Any]:
    """torch's settings that hold for the whole process."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "the number of threads": torch.get_num_threads(),
        "the precision of matmul": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "the autocast dtype": torch.get_autocast_dtype("cpu"),
        "anomaly detection": torch.is_anomaly_enabled(),
        "the recursion limit": sys.getrecursionlimit(),
    }


def torch_functions() -> Functions:
    """The functions of torch that are called everywhere, by name."""
    importlib.import_module("torch._dynamo")  # which replaces torch.manual_seed when it comes
    return {
        f"{owner.__name__}.{name}": value
        for owner in PATCHABLE
        for name, value in vars(owner).items()
        if (callable(value) and not name.startswith("__")) or name in ("__init__", "__call__")
    }


def own_functions(modules: list[ModuleType] | None = None) -> Functions:
    """Functions, classes and methods of this package, by name; of all imported modules but plugins."""
    found: Functions = {}
    for module in engine_modules() if modules is None else modules:
        for name, value in list(vars(module).items()):
            key = f"{module.__name__}.{name}"
            if isinstance(value, (type, FunctionType)):
                found[key] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= {f"{key}.{n}": v for n, v in vars(value).items() if isinstance(v, FunctionType)}
            if type(value).__name__ == "Check":
                found[key] = value.function
    return found


def engine_modules() -> list[ModuleType]:
    """The imported modules of this package without the plugins."""
    plugins = ("peftzoo.methods", "peftzoo.benchmarks", "peftzoo.results")
    return [m for n, m in sys.modules.items() if n.startswith("peftzoo.") and not n.startswith(plugins)]


_at_first: tuple[list[ModuleType], Functions] = ([], {})


def remember_own_functions() -> None:
    """Keep what this package's functions are before any plugin is checked, for `replaced_own_function`."""
    global _at_first
    modules = engine_modules()
    _at_first = modules, own_functions(modules)


def replaced_own_function() -> str:
    """The name of the first function of this package that is another one than at first; "" for none."""
    modules, functions = _at_first
    return first_difference(functions, own_functions(modules))


def first_difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The name of the first value that is another object afterwards, or is gone; "" where there is none."""
    return next((n for n, v in before.items() if n not in after or after[n] is not v), "")


def random_state() -> dict[str, Any]:
    """The global random states of torch, random and numpy."""
    import numpy

    legacy = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "numpy": (legacy[1].tobytes(), *legacy[2:]),
    }


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Afterwards the global random states are as before."""
    import numpy

    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        numpy.random.set_state(before[2])


def seed_everything(seed: int) -> None:
    """Give torch, random and numpy a seed each that nobody sets by chance."""
    import numpy

    torch.manual_seed(8_675_309 + seed)
    random.seed(8_675_310 + seed)
    numpy.random.seed(86_753 + seed)


@contextmanager
def unusual_settings() -> Iterator[None]:
    """Inside, settings have values that nobody sets, so that whoever sets one is seen."""
    before = settings()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float16)
    torch.set_num_threads(before["the number of threads"] + 1)
    torch.set_float32_matmul_precision("medium")
    sys.setrecursionlimit(before["the recursion limit"] + 1)
    try:
        yield
    finally:
        restore(before)


def restore(before: dict[str, Any]) -> None:
    """Set what `settings` gave."""
    torch.set_grad_enabled(before["grad mode"])
    torch.set_default_dtype(before["the default dtype"])
    if torch.get_num_threads() != before["the number of threads"]:
        torch.set_num_threads(before["the number of threads"])
    torch.set_float32_matmul_precision(before["the precision of matmul"])
    torch.use_deterministic_algorithms(before["deterministic algorithms"])
    torch.set_autocast_enabled("cpu", before["autocast"])
    torch.set_autocast_dtype("cpu", before["the autocast dtype"])
    torch.set_anomaly_enabled(before["anomaly detection"])
    sys.setrecursionlimit(before["the recursion limit"])


@contextmanager
def putting_back(functions: Functions) -> Iterator[None]:
    """Afterwards these functions of torch are in their places again, and its settings as they were."""
    before = settings()
    try:
        yield
    finally:
        if settings() != before:
            restore(before)
        for owner in PATCHABLE:
            for name, value in list(vars(owner).items()):
                wanted = functions.get(f"{owner.__name__}.{name}", value)
                if wanted is not value:
                    setattr(owner, name, wanted)


@contextmanager
def putting_back_own(functions: Functions) -> Iterator[None]:
    """Afterwards these functions of this package's modules, not of classes, are in their places again."""
    modules = {m.__name__: m for m in engine_modules()}
    try:
        yield
    finally:
        for key, value in functions.items():
            owner, _, name = key.rpartition(".")
            current = vars(modules[owner]).get(name) if owner in modules else value
            if current is not value and type(current).__name__ != "Check":
                setattr(modules[owner], name, value)
