"""Scoring several adapters on one copy of the model, in shared batches."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from peftzoo.adapters import attach
from peftzoo.runs._packed_adapter import Pack
from peftzoo.scoring.evaluation import Scores, harness_task, run_tasks
from peftzoo.scoring.language_model import LanguageModel
from peftzoo.tasks.schema import Task


class PackedModel(LanguageModel):
    """Answers for every member of an installed pack; a request's task is named `task@member`."""

    def __init__(self, pack: Pack, *given: Any) -> None:
        super().__init__(*given)
        self.pack = pack

    def owner(self, request: Any) -> int:
        return int(request.task_name.rpartition("@")[2])

    def rows_of(self, owners: list[int]) -> AbstractContextManager:
        counts = torch.bincount(torch.tensor(owners), minlength=len(self.pack.members))
        return self.pack.rows(counts.tolist())


def scores(pack: Pack, members: list[int], model: nn.Module, tokenizer: Any, task: Task, rows: Any,
           size: int, precision: str = "fp32", max_new_tokens: int | None = None,
           ) -> list[Scores]:  # fmt: skip
    """Of each of these members on the test rows of `rows`, unmerged; the time is an equal share of the whole.

    `size`: rows in a batch, of all members together. `pack` is not installed on `model`, before or after.
    """
    autocast = torch.bfloat16 if precision == "bf16" else None
    tasks = [harness_task(task, rows, max_new_tokens, name=f"{task.name}@{m}") for m in members]
    handle = attach(model, pack)
    try:
        model.eval()
        return run_tasks(PackedModel(pack, model, tokenizer, size, autocast), tasks, task.extra.metric)
    finally:
        handle.detach()
        pack.release()
