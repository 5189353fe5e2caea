"""What a run forgets: the loss on text that it was not trained on, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftzoo.errors import UserError
from peftzoo.tasks import sources, task_files
from peftzoo.tasks.run_data import EvalSet
from peftzoo.tasks.schema import TaskGroup
from peftzoo.training import batches, losses

ROWS = 200
"""Rows that are read, at most."""
BATCH = 16


def load(name: str, task_group: TaskGroup, source: str, mirror: Path | None) -> EvalSet:
    """Rows of the scored split of task `name`. Raises `UserError` where the course itself trains on it."""
    task = task_files.get(name)
    if task.name in {t.name for t in task_group.tasks}:
        raise UserError(
            f'--retention "{name}" is trained on in this run: name another task, whose text is not'
        )
    rows = sources.load(task, source, mirror, trains=False)
    rows.test = rows.test.select(range(min(ROWS, len(rows.test))))
    return EvalSet(task, rows)


@torch.no_grad()
def loss(model: nn.Module, examples: list[batches.Example], pad: int) -> tuple[float, int]:
    """Mean negative log-likelihood in nats per token of examples whose labels are all their tokens; and the
    number of these tokens."""
    device, keeps = next(model.parameters()).device, losses.takes_logits_to_keep(model)
    total, tokens = 0.0, 0
    for rows in batches.by_length(examples, BATCH):
        batch = batches.collate([examples[i] for i in rows], pad)
        batch: dict[str, Any] = {k: t.to(device) for k, t in batch.items()}
        total += float(losses.summed(model, batch, keeps))
        tokens += losses.count(batch)
    return total / tokens, tokens
