"""Conformance checks: the decorator that declares one, its name, where it applies, and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftzoo.conform.cases import ARCHS, Case, Skip

NAMES: set[str] = set()
"""Names of all checks that are defined so far."""


@dataclass(frozen=True)
class Check:
    """A check and when to run it. Calling it runs it; raises `Skip` where it does not apply."""

    function: Callable[[Case], None]
    archs: tuple[str, ...]
    trains: bool
    slow: bool
    refusable: bool
    once: bool

    @property
    def name(self) -> str:
        """The function's name, `check_...`."""
        return self.function.__name__

    @property
    def proves(self) -> str:
        """What a pass means: the first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    def __call__(self, case: Case) -> None:
        if self.trains and not case.cls.trains:
            raise Skip("the method does not train")
        if self.archs and not self.refusable and (reason := case.refusal()):
            raise Skip(f"not on {case.arch}: {reason}")
        if self.once:
            taken = [a for a in ARCHS if not Case(case.cls, a).refusal()]
            case = Case(case.cls, taken[0] if taken else ARCHS[0])
        self.function(case)


def check(
    archs: tuple[str, ...] = ARCHS,
    trains: bool = False,
    slow: bool = False,
    refusable: bool = False,
    once: bool = False,
) -> Callable[[Callable[[Case], None]], Check]:
    """Decorator that turns a function of a case into a `Check`.

    `archs=()`: needs no model; `trains`: only for methods that train; `slow`: left out of quick runs;
    `refusable`: runs although the method declines the architecture; `once`: what it shows does not depend on
    the architecture, so it runs on the first that the method takes.
    """

    def decorate(function: Callable[[Case], None]) -> Check:
        NAMES.add(function.__name__)
        return Check(function, () if once else archs, trains, slow, refusable, once)

    return decorate
