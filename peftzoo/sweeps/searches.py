"""What the searches of hyperparameters share: how a trial is asked for, and what came of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from peftzoo.errors import UserError
from peftzoo.records.schema import Record
from peftzoo.runs.plan import Plan, Request
from peftzoo.tasks import overlap, splits

LAST_ROUND_SEEDS = 3
"""With so many seeds the best values are compared before one is chosen by its held-out loss."""


class SearchRun(Protocol):
    """The search for one method, task and model, as a loop of `ask` and `tell`."""

    request: Request
    """The run whose settings are searched."""
    seeds: list[int]
    """Those of the runs with the chosen values."""
    measure: str
    """What is compared: score or loss."""
    last_failure: str
    spent: dict[str, Any]
    """Trials, their steps and their seconds so far."""

    @property
    def title(self) -> str:
        """Method and task in words, for messages."""

    @property
    def done(self) -> bool:
        """Whether no trial is under way and none is left."""

    def begin(self, out: Path) -> None:
        """Called once before the first `ask`; `out` is the folder for records."""

    def ask(self) -> Request | None:
        """The request of a trial that can begin now; None if there is none (yet)."""

    def tell(self, record: Record | None, request: Request | None = None) -> None:
        """Report the record of the trial of `request`."""

    def final_requests(self) -> list[Request]:
        """The runs with the chosen values, one per seed; [] if no trial has a result."""

    def left(self) -> tuple[int, int]:
        """Trials that are expected to follow, and their steps."""

    def outline(self, out: Path) -> list[tuple[str, Request, int, bool]]:
        """What is done and to do, for a plan: (kind, a request like it, how many, whether on record)."""


@dataclass
class Tried:
    """What came of some values: the held-out loss of each seed, None where it was not finite."""

    values: dict[str, Any]
    steps: int
    losses: list[float | None] = field(default_factory=list)
    breakdowns: int = 0
    """Seeds whose held-out loss ended above where it began, or not finite."""
    start_loss: float | None = None
    """The held-out loss of the first seed before training."""

    def add(self, record: Record | None) -> None:
        """Add the trial of one seed."""
        loss = held_out_loss(record)
        start = (record.held_out or {}).get("start_loss") if record else None
        self.start_loss = start if self.start_loss is None else self.start_loss
        self.losses.append(loss)
        self.breakdowns += loss is None or (start is not None and loss > start)

    @property
    def mean(self) -> float | None:
        """The mean loss over seeds; None where one is not finite."""
        return None if None in self.losses or not self.losses else statistics.fmean(self.losses)

    @property
    def rank(self) -> tuple[bool, float]:
        """Smaller is better: values at which a seed breaks down come after all others."""
        return bool(self.breakdowns), float("inf") if self.mean is None else self.mean

    def facts(self) -> dict[str, Any]:
        """For the record."""
        facts = {"values": self.values, "steps": self.steps, "losses": self.losses}
        return facts | ({"breakdowns": self.breakdowns} if self.breakdowns else {})


def held_out_loss(record: Record | None) -> float | None:
    """The loss of a trial on its held-out rows after training."""
    return (record.held_out or {}).get("loss") if record else None


def best(tried: Iterable[Tried]) -> Tried | None:
    """The values with the best rank that have a loss; of equal ones the first."""
    with_loss = [t for t in tried if t.mean is not None]
    return min(with_loss, key=lambda t: t.rank) if with_loss else None


def choice(best: Tried) -> dict[str, Any]:
    """The chosen values for the record."""
    facts = {"chosen": best.values, "loss": round(best.mean, 6), "start_loss": best.start_loss}
    facts |= {"metric": "held-out loss"}
    return facts | ({"breakdowns": best.breakdowns} if best.breakdowns else {})


def with_values(request: Request, values: dict[str, Any]) -> Request:
    """The request with these values; `set.NAME` is an option of the method, else a training setting."""
    options = {k.removeprefix("set."): v for k, v in values.items() if k.startswith("set.")}
    train = {k: v for k, v in values.items() if not k.startswith("set.")}
    return replace(request, options=request.options | options, train=request.train | train)


def trial(request: Request, values: dict[str, Any], *, steps: int, seed: int, hold_out: tuple[int, int],
          loss_only: bool) -> Request:  # fmt: skip
    """The request of a trial: `steps` of training on all but the rows that are held out."""
    request = with_values(request, values)
    train = {k: v for k, v in request.train.items() if k != "epochs"} | {"steps": steps}
    request = replace(request, train=train, seed=seed, hold_out=hold_out, loss_only=loss_only, limit=None)
    return replace(request, protocol=None, retention=None) if loss_only else request


def rows_to_hold_out(plan: Plan, wanted: int) -> int:
    """So many training rows of each task, or half of its different ones where that is less.

    Raises `UserError` where a task has fewer than two.
    """
    texts = [overlap.texts(t.task, t.rows) for t in plan.data.train_sets]
    count = min(wanted, splits.half_of_different(texts))
    if count < 1:
        raise UserError(
            f'task "{plan.task_group.name}": too few different training rows to hold some out: take another '
            "--source or --data FOLDER"
        )
    return count


def check_seeds(seeds: Iterable[int], own: range) -> None:
    """Raise `UserError` where a final seed is one of the search's own."""
    if shared := sorted({*seeds} & {*own}):
        raise UserError(
            f"seed {shared[0]} is one of the search's own ({own[0]} to {own[-1]}), which would favour "
            "what it chose: take other --seeds (seeds in a sweep file)"
        )
