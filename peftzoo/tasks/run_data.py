"""The rows of a course: what is trained on, what is scored, and what the record says of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftzoo.errors import UserError
from peftzoo.tasks import overlap, sources
from peftzoo.tasks.schema import Course, Protocol, Task
from peftzoo.tasks.sources import NoRows, Rows


@dataclass
class Part:
    """A scored task: rows that are reported, and rows by which a state of the run is chosen, if any."""

    task: Task
    rows: Rows
    choosing: Any = None

    @property
    def name(self) -> str:
        return self.task.name


@dataclass
class Lesson:
    """Rows to train on (`datasets.Dataset`), the task whose prompts they get, and rows shown in these."""

    task: Task
    rows: Any
    shown: Any = None


@dataclass
class Material:
    """What a run trains on and is scored on."""

    parts: list[Part]
    lessons: list[Lesson]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def trained_rows(self) -> int:
        return sum(len(lesson.rows) for lesson in self.lessons)

    @property
    def scored_rows(self) -> int:
        return sum(len(part.rows.test) for part in self.parts)


def load(course: Course, source: str, mirror: Path | None, trains: bool) -> Material:
    """All rows of the course. A member that the source has no rows for is left out, and the record says so.

    Raises `NoRows` where nothing is left, and `UserError` where a scored row is among the training rows and
    the task does not allow for it.
    """
    together = len(course.tasks) > 1
    parts, left_out = [], {}
    for task in course.tasks:
        try:
            parts.append(Part(task, sources.load(task, source, mirror, trains and not together)))
        except NoRows as error:
            if not together:
                raise
            left_out[task.name] = str(error)
    if not parts:
        raise NoRows(next(iter(left_out.values())))
    lessons, train = _lessons(course, parts, source, mirror)
    if trains and not lessons:
        raise NoRows(
            f'"{course.name}" has no training rows ({source} source): score it with --method none, run a '
            "group that it is in (peftzoo list tasks), or take another --source or --data FOLDER"
        )
    info = parts[0].rows.info if not together else _info(course, parts, lessons, train, left_out)
    info |= overlaps(parts, lessons)
    return Material(parts, lessons, info)


def _lessons(
    course: Course, parts: list[Part], source: str, mirror: Path | None
) -> tuple[list[Lesson], dict[str, Any] | None]:
    """The members' training rows, those of one data set once; or a data set that holds the whole mix."""
    if len(course.tasks) > 1 and (
        found := sources.elsewhere(parts[0].task, course.about.train, source, mirror)
    ):
        rows, info, prompts = found
        return [Lesson(parts[0].task.model_copy(update=prompts), rows)], info
    lessons: dict[Any, Lesson] = {}
    for part in parts:
        t, rows = part.task, part.rows
        if rows.train is not None:
            key = (t.dataset_path, t.dataset_name, t.training_split, str(rows.prompts), t.doc_to_text)
            lessons.setdefault(key, Lesson(t.model_copy(update=rows.prompts), rows.train, rows.shown))
    return [*lessons.values()], None


def _info(course: Course, parts: list[Part], lessons: list[Lesson], train: dict[str, Any] | None,
          left_out: dict[str, str]) -> dict[str, Any]:  # fmt: skip
    files = {f"{p.name}/{s}": f for p in parts for s, f in p.rows.info["files"].items()}
    info = {"source": parts[0].rows.info["source"], "id": course.name, "files": files}
    info["parts"] = {p.name: {k: v for k, v in p.rows.info.items() if k != "files"} for p in parts}
    info["trained_on"] = train or {lesson.task.name: len(lesson.rows) for lesson in lessons}
    return info | ({"left_out": left_out} if left_out else {})


def overlaps(parts: list[Part], lessons: list[Lesson]) -> dict[str, Any]:
    """Scored rows whose text is trained on or shown, per task where the task allows for it.

    Raises `UserError` where a task does not.
    """
    seen = [overlap.texts(lesson.task, lesson.rows) for lesson in lessons]
    found = {}
    for part in parts:
        shown = [overlap.texts(part.task, part.rows.shown)] if part.rows.shown is not None else []
        rows = overlap.shared(overlap.texts(part.task, part.rows.test), [*seen, *shown])
        if rows and part.task.extra.overlap == "refuse":
            raise UserError(
                f'task "{part.name}": the text of {len(rows)} of {len(part.rows.test)} scored rows (first: '
                f"row {rows[0]}) is among the training rows: mend the data, or allow for it in the task file "
                "(metadata.peftzoo.overlap: record)"
            )
        if rows:
            found[part.name] = {"rows": len(rows), "of": len(part.rows.test)}
    return {"overlap": found} if found else {}


def hold_out(material: Material, count: int, seed: int) -> None:
    """Score on `count` training rows of each part, drawn by the seed, and train on the others.

    Rows of equal text go to the same side; those shown in prompts are not drawn. The scored rows are gone.
    Raises `UserError` where training rows cannot be scored or would not suffice.
    """
    held = []
    for part in material.parts:
        lesson = next((x for x in material.lessons if x.rows is part.rows.train), None)
        if lesson is None or part.rows.prompts:
            raise UserError(
                f'task "{part.name}": a search cannot score on its training rows, which are another data '
                "set's or another task's too: leave search out, or take another task or source"
            )
        rows, texts = lesson.rows, overlap.texts(lesson.task, lesson.rows)
        shown = {*overlap.texts(part.task, part.rows.shown)} if part.rows.shown is not None else set()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn = {t: None for i in order if (t := texts[i]) not in shown}
        taken = {*list(drawn)[:count]}
        out = [i for i in range(len(rows)) if texts[i] in taken][:count]
        rest = [i for i in range(len(rows)) if texts[i] not in taken]
        if len(out) > len(rest):
            raise UserError(
                f'task "{part.name}": {count} rows to search on leave {len(rest)} of {len(rows)} to train '
                "on: at most half (search.rows)"
            )
        lesson.rows, part.rows.test = rows.select(rest), rows.select(out)
        held.append(len(out))
    material.info = material.info | {"held_out": {"rows": held, "seed": seed}}


def choose_by(parts: list[Part], protocol: Protocol, seed: int) -> None:
    """Set apart, in each part, the rows by which a state of the run is chosen."""
    for part in parts:
        rows, how = part.rows.test, protocol.choose
        if how == "scored":
            part.choosing = rows
            continue
        count = how if isinstance(how, int) else round(how * len(rows))
        if not 0 < count < len(rows):
            raise UserError(
                f'task "{part.name}": {count} of {len(rows)} scored rows to choose by leave none: another '
                "--protocol or more rows"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        part.choosing = rows.select(sorted(order[:count]))
        part.rows.test = rows.select(sorted(order[count:]))


def limit(parts: list[Part], most: int) -> None:
    """Keep only the first rows of each part."""
    for part in parts:
        part.rows.test = part.rows.test.select(range(min(most, len(part.rows.test))))
        if part.choosing is not None:
            part.choosing = part.choosing.select(range(min(most, len(part.choosing))))
