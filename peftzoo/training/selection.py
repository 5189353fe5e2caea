"""Which checkpoint of a run is reported: the best of several by a score (`schema.Protocol`) or a loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from peftzoo.adapters import Attached
from peftzoo.training import checkpoints

MIN_EVALUATIONS = 5
"""A run of fewer epochs is evaluated so often, at equal distances."""
CHECKS = 20
"""So often a run that may stop early measures its held-out loss; a run of fewer steps does after each."""


def eval_steps(steps: int, rows: int, batch_size: int) -> list[int]:
    """The steps after which a run is evaluated: the end of every epoch, and the last step."""
    epochs = steps * batch_size / rows
    return _equally_spaced(steps, max(MIN_EVALUATIONS, round(epochs)))


def check_steps(steps: int) -> list[int]:
    """The steps after which a run that may stop early measures its held-out loss."""
    return _equally_spaced(steps, CHECKS)


def _equally_spaced(steps: int, count: int) -> list[int]:
    """So many of the steps, or all where there are fewer, at equal distances; the last one is among them."""
    count = min(count, steps)
    return sorted({round(steps * k / count) for k in range(1, count + 1)}) if count else []


@dataclass
class BestCheckpoint:
    """Keeps the best checkpoint in the file `path`, so that an interrupted run goes on with it.

    Called with each step of `eval_steps` or `check_steps`. `score()` gives the score of the adapter as it is,
    None where it is not defined; `scores` maps steps to scores. The best is the highest, or lowest, of them.
    """

    path: Path
    attached: Attached
    score: Callable[[], float | None]
    scores: dict[int, float | None] = field(default_factory=dict)
    higher_is_better: bool = True
    patience: int | None = None
    """Training stops when so many scores in a row are no better than the best before; None: never."""

    def __post_init__(self) -> None:
        if saved := checkpoints.read(self.path):
            self.scores = {int(k): v for k, v in json.loads(saved[0]).items()}

    def __call__(self, step: int) -> bool:
        """Score the adapter after `step`, and keep it if it is the best so far; of equal ones the first.

        Returns whether training stops here. A run that goes on after an interruption does not score a step
        again, and stops where it would have.
        """
        if step not in self.scores:
            self.scores[step] = self.score()
            previous = None if self.chosen == step else checkpoints.read(self.path)
            tensors = previous[1] if previous else checkpoints.trained_tensors(self.attached)
            checkpoints.write(self.path, json.dumps(self.scores), tensors)
        until_now = {s: score for s, score in self.scores.items() if s <= step}
        best = self._best(until_now)
        return self.patience is not None and sum(s > best for s in until_now) >= self.patience

    @property
    def chosen(self) -> int | None:
        """The step of the best checkpoint; None before the first evaluation."""
        return self._best(self.scores)

    def _best(self, scores: dict[int, float | None]) -> int | None:
        """The step with the best score, of equal ones the first; where none is defined, the first step."""
        defined = {step: score for step, score in scores.items() if score is not None}
        sign = 1 if self.higher_is_better else -1
        return max(defined, key=lambda step: (sign * defined[step], -step), default=next(iter(scores), None))

    def restore(self) -> None:
        """Copy the best checkpoint into the adapter. Raises `RuntimeError` if its file is gone or damaged."""
        saved = checkpoints.read(self.path)
        if saved is None or not checkpoints.restore(self.attached, saved[1]):
            raise RuntimeError(f"the checkpoint of step {self.chosen} cannot be read: run again with --force")
