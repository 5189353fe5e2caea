"""Which checkpoint of a run is reported: the best of several by a score (see `schema.Protocol`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from peftzoo.adapters import Attached
from peftzoo.training import checkpoints

MIN_EVALUATIONS = 5
"""A run of fewer epochs is evaluated so often, at equal distances."""


def eval_steps(steps: int, rows: int, batch_size: int) -> list[int]:
    """The steps after which a run is evaluated: the end of every epoch, and the last step."""
    epochs = steps * batch_size / rows
    count = min(max(MIN_EVALUATIONS, round(epochs)), steps)
    return sorted({round(steps * k / count) for k in range(1, count + 1)}) if count else []


@dataclass
class BestCheckpoint:
    """Keeps the best checkpoint in the file `path`, so that an interrupted run goes on with it.

    Called with each step of `eval_steps`. `score()` gives the score of the adapter as it is, None where it is
    not defined; `scores` maps steps to scores. The best is the highest, or lowest, of them.
    """

    path: Path
    attached: Attached
    score: Callable[[], float | None]
    scores: dict[int, float | None] = field(default_factory=dict)
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if saved := checkpoints.read(self.path):
            self.scores = {int(k): v for k, v in json.loads(saved[0]).items()}

    def __call__(self, step: int) -> None:
        """Score the adapter after `step`, and keep it if it is the best so far; of equal ones the first.

        A run that goes on after an interruption does not score a step again.
        """
        if step in self.scores:
            return
        self.scores[step] = self.score()
        previous = None if self.chosen == step else checkpoints.read(self.path)
        tensors = previous[1] if previous else checkpoints.trained_tensors(self.attached)
        checkpoints.write(self.path, json.dumps(self.scores), tensors)

    @property
    def chosen(self) -> int | None:
        """The step of the best checkpoint; None before the first evaluation."""
        defined = {step: score for step, score in self.scores.items() if score is not None}
        sign = 1 if self.higher_is_better else -1
        return max(
            defined, key=lambda step: (sign * defined[step], -step), default=next(iter(self.scores), None)
        )

    def restore(self) -> None:
        """Copy the best checkpoint into the adapter."""
        if saved := checkpoints.read(self.path):
            checkpoints.restore(self.attached, saved[1])
