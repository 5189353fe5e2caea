"""Scores several adapters on one copy of the model, in shared batches."""

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
    """Answers lm-eval's requests for every member of an installed pack.

    The name of a request's task is `TASK@MEMBER`, where MEMBER is the index of the member that answers.
    The other arguments are those of `LanguageModel`.
    """

    def __init__(self, pack: Pack, *args: Any) -> None:
        super().__init__(*args)
        self.pack = pack

    def owner(self, request: Any) -> int:
        """The index of the member that answers this request."""
        return int(request.task_name.rpartition("@")[2])

    def rows_of(self, owners: list[int]) -> AbstractContextManager:
        """Within it, row i of a batch belongs to member `owners[i]`, which are in ascending order."""
        counts = torch.bincount(torch.tensor(owners), minlength=len(self.pack.members))
        return self.pack.rows_per_member(counts.tolist())


def scores(pack: Pack, members: list[int], model: nn.Module, tokenizer: Any, task: Task, rows: Any,
           batch_size: int, precision: str = "fp32", max_new_tokens: int | None = None,
           ) -> list[Scores]:  # fmt: skip
    """Score these members of the pack, unmerged, on the test rows of `rows` (`sources.Rows`).

    Returns the scores in the order of `members`; the time of each is an equal share of the total.
    `batch_size` counts the rows of all members together. `pack` is not installed on `model` before or after.
    """
    autocast = torch.bfloat16 if precision == "bf16" else None
    lm_tasks = [harness_task(task, rows, max_new_tokens, name=f"{task.name}@{member}") for member in members]
    handle = attach(model, pack)
    try:
        model.eval()
        return run_tasks(
            PackedModel(pack, model, tokenizer, batch_size, autocast), lm_tasks, task.extra.metric
        )
    finally:
        handle.detach()
        pack.release()
