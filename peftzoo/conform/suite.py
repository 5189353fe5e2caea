"""The suite: the same checks for every method, for pytest and for `peftzoo check`.

A check is a function `check_x(case)` that returns, raises `AssertionError` with what is wrong, or raises
`Skip`. A method may declare `known_failures = {"check_x": "reason"}` (or `"check_x[gpt2]"`): strict, a known
failure that passes is a failure.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

from peftzoo.conform import (
    counting,
    gradients,
    isolation,
    lifetime,
    options,
    placement,
    plugin,
    process,
    training,
    weights,
    where,
)
from peftzoo.conform.cases import ARCHS, Case, Skip
from peftzoo.conform.rules import Check
from peftzoo.contract import registry

ANY = "-"
"""In place of the architecture for checks that need no model."""


@dataclass(frozen=True)
class Result:
    """The outcome of one check of one method: ok, failed, skipped or known (a declared failure)."""

    method: str
    check: str
    arch: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    trace: str = ""
    place: str = ""
    """File and line of the plugin that a failure is about."""


@cache
def checks() -> list[Check]:
    """All checks, in the order of the reports."""
    modules = (plugin, options, counting, placement, gradients, training, lifetime, isolation, weights)
    return [c for m in modules for c in vars(m).values() if isinstance(c, Check)]


def plan(archs: Iterable[str] = ARCHS, slow: bool = True) -> list[tuple[Check, str]]:
    """The pairs (check, architecture) to run for one method; `ANY` for a check that needs no model."""
    selected = [c for c in checks() if slow or not c.slow]
    pairs = [(c, ANY) for c in selected if not c.archs]
    return pairs + [(c, arch) for arch in archs for c in selected if arch in c.archs]


def run(name: str, archs: Iterable[str] = ARCHS, slow: bool = True) -> list[Result]:
    """Every check of one method. Raises `UserError` for an unknown name."""
    cls = registry.get(name)
    return [run_one(cls, check, arch) for check, arch in plan(archs, slow)]


def run_one(cls: type, check: Check, arch: str) -> Result:
    """Run one check, and leave torch and its random state as they were; its errors become a `Result`."""
    start = time.perf_counter()
    known = cls.known_failures.get(f"{check.name}[{arch}]", cls.known_failures.get(check.name))
    outcome, reason, trace, place = "ok", "", "", ""
    with process.putting_back(process.torch_functions()), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            check(Case(cls, arch))
        except Skip as skip:
            outcome, reason = "skipped", str(skip)
        except Exception as error:
            trace, place = traceback.format_exc(), where.place(cls, error)
            explained = isinstance(error, AssertionError) and str(error)
            outcome, reason = "failed", str(error) if explained else f"{type(error).__name__}: {error}"
    if known is not None and outcome == "failed":
        outcome, reason = "known", f"{known} ({reason})"
    elif known is not None and outcome == "ok":
        outcome, reason = "failed", f"passes, so take it out of known_failures (declared: {known})"
        place = where.place(cls, AssertionError("known_failures"))
    return Result(cls.name, check.name, arch, outcome, reason, time.perf_counter() - start, trace, place)


process.remember_own_functions()  # when no plugin has been checked yet
