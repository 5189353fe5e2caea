"""Which state of a run is reported: the best of several points of the training, by a score."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from peftzoo.adapters import Attached
from peftzoo.training import checkpoints

MIN_EVALUATIONS = 5
"""A run of a few passes or less is looked at so often, at equal distances."""


def eval_steps(steps: int, rows: int, batch_size: int) -> list[int]:
    """The steps after which a run is scored: the end of every pass over the rows, and the last step."""
    passes = steps * batch_size / rows
    count = min(max(MIN_EVALUATIONS, round(passes)), steps)
    return sorted({round(steps * k / count) for k in range(1, count + 1)}) if count else []


@dataclass
class BestCheckpoint:
    """Keeps the best state in the file `path`, so that an interrupted run goes on with it.

    `score` gives the score of the state as it is, None where it is not defined.
    """

    path: Path
    attached: Attached
    score: Callable[[], float | None]
    scores: dict[int, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if kept := checkpoints.read(self.path):
            self.scores = {int(k): v for k, v in json.loads(kept[0]).items()}

    def __call__(self, step: int) -> None:
        """Score this state and keep it if it is the best so far; of equal ones the first.

        A run that goes on from a checkpoint does not score again what it has scored before.
        """
        if step in self.scores:
            return
        self.scores[step] = self.score()
        kept = None if self.chosen == step else checkpoints.read(self.path)
        state = kept[1] if kept else checkpoints.trained(self.attached)
        checkpoints.write(self.path, json.dumps(self.scores), state)

    @property
    def chosen(self) -> int | None:
        """The step of the best state."""
        known = {k: v for k, v in self.scores.items() if v is not None}
        return max(known, key=lambda k: (known[k], -k), default=next(iter(self.scores), None))

    def restore(self) -> None:
        """Put the best state back."""
        if kept := checkpoints.read(self.path):
            checkpoints.restore(self.attached, kept[1])
