"""Retention: how much a run forgets, as the loss on another task's text before and after training."""

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

MAX_ROWS = 200
BATCH_SIZE = 16


def load(name: str, task_group: TaskGroup, source: str, mirror: Path | None) -> EvalSet:
    """The first `MAX_ROWS` scored rows of task `name`.

    Raises `UserError` where the task group of the run trains on that task.
    """
    task = task_files.get(name)
    if task.name in {t.name for t in task_group.tasks}:
        raise UserError(
            f'--retention "{name}" is trained on in this run: name another task, whose text is not'
        )
    rows = sources.load(task, source, mirror, trains=False)
    rows.test = rows.test.select(range(min(MAX_ROWS, len(rows.test))))
    return EvalSet(task, rows)


@torch.no_grad()
def loss(model: nn.Module, examples: list[batches.Example], pad: int) -> tuple[float, int]:
    """Mean negative log-likelihood of the examples' target tokens, in nats per token, and their number."""
    device, skip_prompt_logits = next(model.parameters()).device, losses.takes_logits_to_keep(model)
    total, tokens = 0.0, 0
    for rows in batches.by_length(examples, BATCH_SIZE):
        batch = batches.collate([examples[i] for i in rows], pad)
        batch: dict[str, Any] = {k: t.to(device) for k, t in batch.items()}
        total += float(losses.loss_sum(model, batch, skip_prompt_logits))
        tokens += losses.target_count(batch)
    return total / tokens, tokens
