"""How to prune a base model, as `--prune` says it; without torch, so that mistakes are told at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from peftzoo.errors import UserError, unknown

CRITERIA = ("magnitude", "wanda")


@dataclass(frozen=True)
class Pruning:
    """What is set to zero: a `share` of the weights, or of every `group` adjacent weights in a row."""

    criterion: str
    share: float
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> Pruning:
        """`magnitude:0.5`, `wanda:0.5`, or N:M patterns such as `wanda:2:4` (N of M become zero).

        Raises `UserError` for an unknown criterion and for a share outside (0, 1).
        """
        criterion, _, amount = text.partition(":")
        if criterion not in CRITERIA:
            raise unknown("pruning", criterion, CRITERIA)
        if match := re.fullmatch(r"(\d+):(\d+)", amount):
            n, m = int(match[1]), int(match[2])
            share, group = (n / m, m) if m else (0.0, 0)
        else:
            share, group = (float(amount) if re.fullmatch(r"0?\.\d+", amount) else 0.0), 0
        if not 0 < share < 1:
            raise UserError(
                f'--prune "{text}": write {criterion}:0.5 (a share between 0 and 1) or {criterion}:2:4'
            )
        return cls(criterion, share, group)
