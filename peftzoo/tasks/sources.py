"""Rows for a task from one of three sources with the same columns: Hub, local mirror, embedded generator.

The source is never guessed from the state of the network. `--source` decides; without it `--data` means the
mirror; without both, the embedded model uses embedded rows, and any other model uses the mirror named by
`PEFTZOO_DATA`, else the Hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftzoo.errors import UserError, unknown
from peftzoo.tasks import overlap, task_files

SOURCES = ("embedded", "mirror", "hub")
EMBEDDED_SEED = 0
"""Embedded rows are the same for every run, as a published data set would be."""


class NoRows(UserError):
    """The source has no such rows."""


@dataclass
class Rows:
    """Rows to train on, to score and, where the task says so, to show in prompts (`datasets.Dataset` each).

    `train` is None where there are none. `info` is what the record says about them, `prompts` the task's keys
    that other training rows than its own bring with them.
    """

    train: Any
    test: Any
    info: dict[str, Any] = field(default_factory=dict)
    fewshot: Any = None
    prompts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wanted:
    """Splits of one data set; those in `spare` may be missing, `task` is for messages."""

    task: str
    path: str
    name: str | None
    splits: tuple[str, ...]
    spare: tuple[str, ...] = ()
    stand_in: dict[str, str] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return "/".join(filter(None, (self.path, self.name)))


def mirror_folder(given: str | None) -> Path | None:
    """The mirror that was named, by argument or by `PEFTZOO_DATA`."""
    named = given or os.environ.get("PEFTZOO_DATA")
    if named and not Path(named).is_dir():
        raise UserError(f'data mirror "{named}": no such folder (--data or PEFTZOO_DATA)')
    return Path(named) if named else None


def select_source(source: str | None, model: str, mirror: Path | None, named: bool = False) -> str:
    """The source for this run; see the rule at the top of the file. `named`: the mirror is from `--data`."""
    if source is not None:
        if source not in SOURCES:
            raise unknown("source", source, SOURCES)
        if source == "mirror" and mirror is None:
            raise UserError("source mirror: name its folder with --data FOLDER or PEFTZOO_DATA")
        return source
    if model == "embedded" and not named:
        return "embedded"
    return "mirror" if mirror else "hub"


def load(task: task_files.Task, source: str, mirror: Path | None = None, trains: bool = True) -> Rows:
    """Rows of the task's training split, of the split that is scored, and of the one shown in the prompt.

    Raises `NoRows` where the source lacks them; training rows may be missing unless the run `trains`. A task
    that is only scored has none.
    """
    other = alternative_train_set(task, task.extra.train, source, mirror)
    own = task.training_split
    spare = (own,) if own and (other or not trains) and own != task.eval_split else ()
    if source == "embedded":
        found, info = _embedded(task)
    else:
        cut = task.extra.cut
        splits = (cut.of,) if cut else task.splits
        path, name = _place(task, source)
        wanted = _Wanted(task.name, path, name, splits, spare, task.extra.stand_in, task.dataset_kwargs)
        found, info = _READERS[source](wanted, mirror)
        if cut:
            found, info["cut"] = _cut(task, cut, found[cut.of])
    made = {s: _dataset(found[s], info["id"]) for s in task.splits if s in found}
    fewshot = made[task.fewshot_split] if task.num_fewshot else None
    rows = Rows(made.get(own), made[task.eval_split], info, fewshot)
    if other:
        rows.train, info["train"], rows.prompts = other
    return rows


def sources(task: task_files.Task, mirror: Path | None) -> list[str]:
    """Where the task's scored rows may come from; the mirror only if its file is there, which is not read."""
    path, name = _place(task, "mirror")
    split = task.extra.cut.of if task.extra.cut else task.eval_split
    files = {split, task.extra.stand_in.get(split, split)}
    folder = mirror and mirror / _folder_name(path) / _folder_name(name or "default")
    there = folder and any((folder / f"{_folder_name(file)}.jsonl").is_file() for file in files)
    return ["embedded"] * bool(task.extra.embedded) + ["mirror"] * bool(there) + ["hub"]


def _place(task: task_files.Task, source: str) -> tuple[str, str | None]:
    """The data set's name and configuration, which a mirror may have under another name."""
    return (source == "mirror" and task.extra.mirror) or (task.dataset_path, task.dataset_name)


def alternative_train_set(
    task: task_files.Task, choices: tuple[task_files.TrainSource, ...], source: str, mirror: Path | None
) -> tuple[Any, dict[str, Any], dict[str, str]] | None:
    """The first of these training sets that the source has: its rows, what the record says, its prompts."""
    for choice in choices if source != "embedded" else ():
        wanted = _Wanted(task.name, choice.dataset_path, choice.dataset_name, (choice.split,))
        try:
            found, info = _READERS[source](wanted, mirror)
        except NoRows:
            continue
        return _dataset(found[choice.split], info["id"]), info, choice.prompts
    return None


def _dataset(rows: list[dict[str, Any]], name: str) -> Any:
    import datasets

    try:
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are among them
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{name}: its rows differ in their columns' types ({why})") from None


SplitRows = tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]
"""Rows of each split that was read, and what the record says of them."""


def _embedded(task: task_files.Task) -> SplitRows:
    spec = task.extra.embedded
    if spec is None:
        raise NoRows(f'task "{task.name}" has no embedded generator: use --data FOLDER or --source hub')
    counts = {task.test_split: spec.test, task.validation_split: spec.validation}
    counts |= {task.fewshot_split: spec.fewshot, task.training_split: spec.train}
    make = task_files.generator(task)
    try:
        rows = {s: make(s, counts[s], EMBEDDED_SEED) for s in task.splits}
    except ValueError as error:
        raise UserError(f'task "{task.name}": its generator {spec.rows} makes {error}') from None
    info = {"source": "embedded", "id": spec.rows.split(":")[0], "revision": f"v{task.version:g}"}
    return rows, info | {"files": {s: {"sha256": _digest(r), "rows": len(r)} for s, r in rows.items()}}


def _digest(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _cut(task: task_files.Task, cut: task_files.Cut, rows: list[dict[str, Any]]) -> SplitRows:
    """The splits that a cut makes. Equal questions stay in one, so no scored row is among the others."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row, text in zip(rows, overlap.texts(task, _dataset(rows, task.name)), strict=True):
        groups.setdefault(text, []).append(row)
    texts = list(groups)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(cut.seed)).tolist()
    if (needed := sum(cut.parts.values())) >= len(texts):
        raise UserError(
            f'split "{cut.of}" has {len(texts)} distinct rows; the task cuts off {needed} of them'
        )
    made: dict[str, list[dict[str, Any]]] = {}
    for name, count in cut.parts.items():
        made[name] = [groups[texts[i]][0] for i in order[:count]]
        order = order[count:]
    made[cut.rest] = [row for i in order for row in groups[texts[i]]]
    splits = {name: {"sha256": _digest(r), "rows": len(r)} for name, r in made.items()}
    return made, {"of": cut.of, "seed": cut.seed, "splits": splits}


def _mirror(wanted: _Wanted, mirror: Path | None) -> SplitRows:
    place = mirror / _folder_name(wanted.path) / _folder_name(wanted.name or "default")
    found, files = {}, {}
    for split in wanted.splits:
        path = place / f"{_folder_name(split)}.jsonl"
        other = place / f"{_folder_name(wanted.stand_in.get(split, split))}.jsonl"
        if not path.is_file() and not other.is_file():
            if split in wanted.spare:
                continue
            have = ", ".join(sorted(p.stem for p in place.glob("*.jsonl"))) or "nothing"
            raise NoRows(
                f'task "{wanted.task}": the mirror lacks {path.relative_to(mirror)} (it has {have} there); '
                "three ways out: another --data FOLDER, --source hub, or --model embedded"
            )
        stands_in = {} if path.is_file() else {"stand_in": other.stem}
        path = path if path.is_file() else other
        data = path.read_bytes()
        found[split] = _json_lines(data, str(path.relative_to(mirror)))
        files[split] = {"sha256": hashlib.sha256(data).hexdigest(), "rows": len(found[split])} | stands_in
    return found, {"source": "mirror", "id": wanted.id, "files": files}


def _json_lines(data: bytes, name: str) -> list[dict[str, Any]]:
    """One JSON object per line. Raises `UserError` naming the file and the line."""
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):  # not splitlines: a string may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{name}, line {number}: not JSON ({' '.join(str(error).split())[:120]})"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{name}, line {number}: a row is a JSON object with the columns as keys")
        rows.append(row)
    if not rows:
        raise UserError(f"{name}: no rows")
    return rows


def _folder_name(name: str) -> str:
    """`openai/gsm8k` -> `openai__gsm8k`; nothing that could climb out of the mirror."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name.replace("/", "__"))
    return safe.lstrip(".") or "_"


def _hub(wanted: _Wanted, _: Path | None) -> SplitRows:
    import datasets

    from peftzoo.models import hub

    offline = not hub.answers(wanted.path, "dataset")
    if offline:  # what was fetched before still loads
        datasets.config.HF_HUB_OFFLINE = True
    try:
        found = datasets.load_dataset(wanted.path, wanted.name, **wanted.kwargs)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = "the Hub cannot be reached" if offline else " ".join(str(error).split())[:120]
        raise NoRows(
            f'no data for task "{wanted.task}": {why}; three ways out: --data FOLDER (a local mirror, see '
            "README), a machine that reaches the Hub, or --source embedded"
        ) from None
    if missing := [s for s in wanted.splits if s not in found and s not in wanted.spare]:
        raise NoRows(f'task "{wanted.task}": {wanted.path} has no split "{missing[0]}": {", ".join(found)}')
    rows = {s: found[s].to_list() for s in wanted.splits if s in found}
    files = {s: {"sha256": _digest(r), "rows": len(r)} for s, r in rows.items()}
    return rows, {"source": "hub", "id": wanted.id, "files": files}


_READERS = {"mirror": _mirror, "hub": _hub}
