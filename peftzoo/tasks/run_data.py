"""The rows of a run: its train sets, its eval sets, and what the record says of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftzoo.errors import UserError
from peftzoo.tasks import overlap, row_numbers, sources
from peftzoo.tasks.schema import Task, TaskGroup
from peftzoo.tasks.sources import NoRows, Rows


@dataclass
class EvalSet:
    """A task to score: its rows, of which `rows.test` is reported.

    `selection_rows` (`datasets.Dataset` or None): the rows whose score selects the reported checkpoint.
    """

    task: Task
    rows: Rows
    selection_rows: Any = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name


@dataclass
class TrainSet:
    """Rows to train on (`datasets.Dataset`), the task that makes their prompts, and its few-shot rows."""

    task: Task
    rows: Any
    fewshot: Any = None


@dataclass
class RunData:
    """What a run trains on and is scored on; `info` is what the record says of it.

    `validation_sets`: rows taken from the train sets, one set for each, on which only the loss is measured.
    """

    eval_sets: list[EvalSet]
    train_sets: list[TrainSet]
    info: dict[str, Any] = field(default_factory=dict)
    validation_sets: list[TrainSet] = field(default_factory=list)

    @property
    def trained_rows(self) -> int:
        """Rows of all train sets together."""
        return sum(len(train_set.rows) for train_set in self.train_sets)

    @property
    def scored_rows(self) -> int:
        """Reported rows of all eval sets together."""
        return sum(len(eval_set.rows.test) for eval_set in self.eval_sets)


def load(task_group: TaskGroup, source: str, mirror: Path | None, trains: bool) -> RunData:
    """All rows of the task group. A member that the source has no rows for is left out, and the record says
    so.

    Raises `NoRows` where nothing is left, and `UserError` where a scored row is among the training rows and
    the task does not allow for it.
    """
    several = len(task_group.tasks) > 1
    eval_sets, left_out = [], {}
    for task in task_group.tasks:
        try:
            eval_sets.append(EvalSet(task, sources.load(task, source, mirror, trains and not several)))
        except NoRows as error:
            if not several:
                raise
            left_out[task.name] = str(error)
    if not eval_sets:
        raise NoRows(next(iter(left_out.values())))
    train_sets, alternative_info = _train_sets(task_group, eval_sets, source, mirror)
    if trains and not train_sets:
        raise NoRows(
            f'"{task_group.name}" has no training rows ({source} source): score it with --method none, run a '
            "group that it is in (peftzoo list tasks), or take another --source or --data FOLDER"
        )
    info = (
        eval_sets[0].rows.info
        if not several
        else _group_info(task_group, eval_sets, train_sets, alternative_info, left_out)
    )
    info |= overlaps(eval_sets, train_sets)
    return RunData(eval_sets, train_sets, info)


def _train_sets(
    task_group: TaskGroup, eval_sets: list[EvalSet], source: str, mirror: Path | None
) -> tuple[list[TrainSet], dict[str, Any] | None]:
    """The train sets of the group, and what the record says of an alternative one, if that is used.

    A group may name a data set that holds its whole training mixture; where the source has it, it is the only
    train set. Else they are the members' own training rows, those of one data set once.
    """
    if len(task_group.tasks) > 1 and (
        alternative := sources.alternative_train_set(
            eval_sets[0].task, task_group.about.train, source, mirror
        )
    ):
        rows, info, prompts = alternative
        return [TrainSet(eval_sets[0].task.model_copy(update=prompts), rows)], info
    train_sets: dict[Any, TrainSet] = {}
    for eval_set in eval_sets:
        task, rows = eval_set.task, eval_set.rows
        if rows.train is not None:
            key = (
                task.dataset_path,
                task.dataset_name,
                task.training_split,
                str(rows.prompts),
                task.doc_to_text,
            )
            train_set = TrainSet(task.model_copy(update=rows.prompts), rows.train, rows.fewshot)
            train_sets.setdefault(key, train_set)
    return [*train_sets.values()], None


def _group_info(
    task_group: TaskGroup,
    eval_sets: list[EvalSet],
    train_sets: list[TrainSet],
    alternative_info: dict[str, Any] | None,
    left_out: dict[str, str],
) -> dict[str, Any]:
    """What the record says of the rows of a group of several tasks."""
    files = {f"{e.name}/{split}": file for e in eval_sets for split, file in e.rows.info["files"].items()}
    info = {"source": eval_sets[0].rows.info["source"], "id": task_group.name, "files": files}
    info["parts"] = {e.name: {k: v for k, v in e.rows.info.items() if k != "files"} for e in eval_sets}
    own_rows = {train_set.task.name: len(train_set.rows) for train_set in train_sets}
    info["trained_on"] = alternative_info or own_rows
    return info | ({"left_out": left_out} if left_out else {})


def overlaps(eval_sets: list[EvalSet], train_sets: list[TrainSet]) -> dict[str, Any]:
    """How many scored rows have a text that is also a training or few-shot row's, as an entry of the record.

    `{"overlap": {task name: {"rows": overlapping, "of": scored}}}`, for tasks that allow for it; {} where no
    row overlaps. Raises `UserError` where a task does not allow for it.
    """
    train_texts = [overlap.texts(train_set.task, train_set.rows) for train_set in train_sets]
    counts = {}
    for eval_set in eval_sets:
        fewshot_texts = (
            [overlap.texts(eval_set.task, eval_set.rows.fewshot)] if eval_set.rows.fewshot is not None else []
        )
        shared = overlap.overlapping_indices(
            overlap.texts(eval_set.task, eval_set.rows.test), [*train_texts, *fewshot_texts]
        )
        if shared and eval_set.task.extra.overlap == "refuse":
            first = row_numbers.of(eval_set.rows.test)[shared[0]]
            raise UserError(
                f'task "{eval_set.name}": the text of {len(shared)} of {len(eval_set.rows.test)} scored rows '
                f"(first: row {first}) is among the training rows: mend the data, or allow for it in the "
                "task file (metadata.peftzoo.overlap: record)"
            )
        if shared:
            counts[eval_set.name] = {"rows": len(shared), "of": len(eval_set.rows.test)}
    return {"overlap": counts} if counts else {}
