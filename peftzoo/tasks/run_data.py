"""The rows of a run: its train sets, its eval sets, and what the record says of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftzoo.errors import UserError
from peftzoo.tasks import overlap, sources
from peftzoo.tasks.schema import Task, TaskGroup
from peftzoo.tasks.sources import NoRows, Rows


@dataclass
class EvalSet:
    """A scored task: rows that are reported, and rows by which a state of the run is chosen, if any."""

    task: Task
    rows: Rows
    selection_rows: Any = None

    @property
    def name(self) -> str:
        return self.task.name


@dataclass
class TrainSet:
    """Rows to train on (`datasets.Dataset`), the task whose prompts they get, and rows shown in these."""

    task: Task
    rows: Any
    fewshot: Any = None


@dataclass
class RunData:
    """What a run trains on and is scored on."""

    eval_sets: list[EvalSet]
    train_sets: list[TrainSet]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def trained_rows(self) -> int:
        return sum(len(train_set.rows) for train_set in self.train_sets)

    @property
    def scored_rows(self) -> int:
        return sum(len(eval_set.rows.test) for eval_set in self.eval_sets)


def load(task_group: TaskGroup, source: str, mirror: Path | None, trains: bool) -> RunData:
    """All rows of the task group. A member that the source has no rows for is left out, and the record says
    so.

    Raises `NoRows` where nothing is left, and `UserError` where a scored row is among the training rows and
    the task does not allow for it.
    """
    together = len(task_group.tasks) > 1
    eval_sets, left_out = [], {}
    for task in task_group.tasks:
        try:
            eval_sets.append(EvalSet(task, sources.load(task, source, mirror, trains and not together)))
        except NoRows as error:
            if not together:
                raise
            left_out[task.name] = str(error)
    if not eval_sets:
        raise NoRows(next(iter(left_out.values())))
    train_sets, train = _train_sets(task_group, eval_sets, source, mirror)
    if trains and not train_sets:
        raise NoRows(
            f'"{task_group.name}" has no training rows ({source} source): score it with --method none, run a '
            "group that it is in (peftzoo list tasks), or take another --source or --data FOLDER"
        )
    info = (
        eval_sets[0].rows.info if not together else _info(task_group, eval_sets, train_sets, train, left_out)
    )
    info |= overlaps(eval_sets, train_sets)
    return RunData(eval_sets, train_sets, info)


def _train_sets(
    task_group: TaskGroup, eval_sets: list[EvalSet], source: str, mirror: Path | None
) -> tuple[list[TrainSet], dict[str, Any] | None]:
    """The members' training rows, those of one data set once; or a data set that holds the whole mix."""
    if len(task_group.tasks) > 1 and (
        found := sources.alternative_train_set(eval_sets[0].task, task_group.about.train, source, mirror)
    ):
        rows, info, prompts = found
        return [TrainSet(eval_sets[0].task.model_copy(update=prompts), rows)], info
    train_sets: dict[Any, TrainSet] = {}
    for eval_set in eval_sets:
        t, rows = eval_set.task, eval_set.rows
        if rows.train is not None:
            key = (t.dataset_path, t.dataset_name, t.training_split, str(rows.prompts), t.doc_to_text)
            train_sets.setdefault(key, TrainSet(t.model_copy(update=rows.prompts), rows.train, rows.fewshot))
    return [*train_sets.values()], None


def _info(task_group: TaskGroup, eval_sets: list[EvalSet], train_sets: list[TrainSet],
          train: dict[str, Any] | None, left_out: dict[str, str]) -> dict[str, Any]:  # fmt: skip
    files = {f"{p.name}/{s}": f for p in eval_sets for s, f in p.rows.info["files"].items()}
    info = {"source": eval_sets[0].rows.info["source"], "id": task_group.name, "files": files}
    info["parts"] = {p.name: {k: v for k, v in p.rows.info.items() if k != "files"} for p in eval_sets}
    info["trained_on"] = train or {train_set.task.name: len(train_set.rows) for train_set in train_sets}
    return info | ({"left_out": left_out} if left_out else {})


def overlaps(eval_sets: list[EvalSet], train_sets: list[TrainSet]) -> dict[str, Any]:
    """Scored rows whose text is trained on or shown, per task where the task allows for it.

    Raises `UserError` where a task does not.
    """
    seen = [overlap.texts(train_set.task, train_set.rows) for train_set in train_sets]
    found = {}
    for eval_set in eval_sets:
        fewshot = (
            [overlap.texts(eval_set.task, eval_set.rows.fewshot)] if eval_set.rows.fewshot is not None else []
        )
        rows = overlap.shared(overlap.texts(eval_set.task, eval_set.rows.test), [*seen, *fewshot])
        if rows and eval_set.task.extra.overlap == "refuse":
            raise UserError(
                f'task "{eval_set.name}": the text of {len(rows)} of {len(eval_set.rows.test)} scored rows '
                f"(first: row {rows[0]}) is among the training rows: mend the data, or allow for it in the "
                "task file (metadata.peftzoo.overlap: record)"
            )
        if rows:
            found[eval_set.name] = {"rows": len(rows), "of": len(eval_set.rows.test)}
    return {"overlap": found} if found else {}
