"""Rows of a task from one of three sources with the same columns: Hub, local mirror, embedded generator.

A mirror is a folder with one file per split, `<data set>/<configuration or default>/<split>.jsonl`, in which
`/` in the data set's name is `__`.

The source is never guessed from the state of the network. `--source` decides; without it `--data` means the
mirror; without both, the embedded model uses embedded rows, and any other model uses the mirror named by
`PEFTZOO_DATA`, else the Hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftzoo.errors import UserError, unknown
from peftzoo.tasks import overlap, row_numbers, task_files

SOURCES = ("embedded", "mirror", "hub")
EMBEDDED_SEED = 0
"""Embedded rows are the same for every run, as a published data set would be."""


class NoRows(UserError):
    """The source has no such rows."""


@dataclass
class Rows:
    """A task's training rows, scored rows and few-shot rows, each a `datasets.Dataset` with `row_numbers`.

    `train` and `fewshot` are None where there are none. `info` is what the record says about the rows;
    `prompts` are the keys of the task that an alternative train set replaces.
    """

    train: Any
    test: Any
    info: dict[str, Any] = field(default_factory=dict)
    fewshot: Any = None
    prompts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Query:
    """Splits of one data set to read; those in `optional` may be missing, `task` is for messages.

    `stand_in`: split -> the split of a mirror to read in its place; `kwargs` are for `load_dataset`.
    """

    task: str
    path: str
    name: str | None
    splits: tuple[str, ...]
    optional: tuple[str, ...] = ()
    stand_in: dict[str, str] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Name and configuration of the data set, for the record."""
        return "/".join(filter(None, (self.path, self.name)))


def mirror_folder(argument: str | None) -> Path | None:
    """The mirror named by the argument (`--data`), else by `PEFTZOO_DATA`; None where neither names one.

    Raises `UserError` where the folder does not exist.
    """
    folder = argument or os.environ.get("PEFTZOO_DATA")
    if folder and not Path(folder).is_dir():
        raise UserError(f'data mirror "{folder}": no such folder (--data or PEFTZOO_DATA)')
    return Path(folder) if folder else None


def select_source(source: str | None, model: str, mirror: Path | None, named: bool = False) -> str:
    """The source for this run, one of `SOURCES`; see the rule at the top of the file.

    `named`: the mirror is from `--data`. Raises `UserError` for an unknown source, and for a mirror without
    a folder.
    """
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
    """The task's training rows, scored rows and few-shot examples.

    Raises `NoRows` where the source lacks them; training rows may be missing unless the run `trains`. A task
    that is only scored has none.
    """
    alternative = alternative_train_set(task, task.extra.train, source, mirror)
    own = task.training_split
    optional = (own,) if own and (alternative or not trains) and own != task.eval_split else ()
    chosen: dict[str, list[int]] = {}
    if source == "embedded":
        rows_of_split, info = _generate_embedded(task)
    else:
        cut = task.extra.cut
        splits = (cut.of,) if cut else task.splits
        path, name = _dataset_id(task, source)
        query = _Query(task.name, path, name, splits, optional, task.extra.stand_in, task.dataset_kwargs)
        rows_of_split, info = _READERS[source](query, mirror)
        if cut:
            whole = rows_of_split[cut.of]
            chosen, info["cut"] = _cut(task, cut, whole)
            rows_of_split = {s: [whole[i] for i in numbers] for s, numbers in chosen.items()}
    dataset_of = {
        s: _dataset(rows_of_split[s], info["id"], chosen.get(s)) for s in task.splits if s in rows_of_split
    }
    fewshot = dataset_of[task.fewshot_split] if task.num_fewshot else None
    rows = Rows(dataset_of.get(own), dataset_of[task.eval_split], info, fewshot)
    if alternative:
        rows.train, info["train"], rows.prompts = alternative
    return rows


def available_sources(task: task_files.Task, mirror: Path | None) -> list[str]:
    """The sources that the task's scored rows may come from.

    The mirror is among them only if its file exists; the Hub always is. Nothing is read.
    """
    path, name = _dataset_id(task, "mirror")
    split = task.extra.cut.of if task.extra.cut else task.eval_split
    files = {split, task.extra.stand_in.get(split, split)}
    folder = mirror and mirror / _folder_name(path) / _folder_name(name or "default")
    in_mirror = folder and any((folder / f"{_folder_name(file)}.jsonl").is_file() for file in files)
    return ["embedded"] * bool(task.extra.embedded) + ["mirror"] * bool(in_mirror) + ["hub"]


def _dataset_id(task: task_files.Task, source: str) -> tuple[str, str | None]:
    """The data set's name and configuration, which a mirror may have under another name."""
    return (source == "mirror" and task.extra.mirror) or (task.dataset_path, task.dataset_name)


def alternative_train_set(
    task: task_files.Task, choices: tuple[task_files.TrainSource, ...], source: str, mirror: Path | None
) -> tuple[Any, dict[str, Any], dict[str, str]] | None:
    """The first of these train sets that the source has, or None.

    Returns its rows (`datasets.Dataset`), what the record says of them, and the task's keys that it replaces.
    """
    for choice in choices if source != "embedded" else ():
        query = _Query(task.name, choice.dataset_path, choice.dataset_name, (choice.split,))
        try:
            rows_of_split, info = _READERS[source](query, mirror)
        except NoRows:
            continue
        return _dataset(rows_of_split[choice.split], info["id"]), info, choice.prompts
    return None


def _dataset(rows: list[dict[str, Any]], name: str, numbers: list[int] | None = None) -> Any:
    """The rows as a `datasets.Dataset`, with their numbers: those given, else their places.

    Raises `UserError` where a column holds several types.
    """
    import datasets

    try:
        return datasets.Dataset.from_list(row_numbers.numbered(rows, numbers or range(len(rows))))
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are among them
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{name}: its rows differ in their columns' types ({why})") from None


SplitRows = tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]
"""Rows of each split that was read, and what the record says of them."""


def _generate_embedded(task: task_files.Task) -> SplitRows:
    """Rows of the task's embedded generator. Raises `NoRows` where it has none."""
    spec = task.extra.embedded
    if spec is None:
        raise NoRows(f'task "{task.name}" has no embedded generator: use --data FOLDER or --source hub')
    counts = {task.fewshot_split: spec.fewshot}  # which may be one of the others
    counts |= {task.test_split: spec.test, task.validation_split: spec.validation}
    counts |= {task.training_split: spec.train}
    generate = task_files.generator(task)
    try:
        rows = {s: _generated(generate, s, counts[s]) for s in task.splits}
    except ValueError as error:
        raise UserError(f'task "{task.name}": its generator {spec.rows} makes {error}') from None
    info = {"source": "embedded", "id": spec.rows.split(":")[0], "revision": f"v{task.version:g}"}
    return rows, info | {"files": {s: {"sha256": _digest(r), "rows": len(r)} for s, r in rows.items()}}


@lru_cache(maxsize=12)
def _generated(generate: Callable[..., list[dict[str, Any]]], split: str, count: int) -> list[dict[str, Any]]:
    """The rows of one split; the runs of a process share them."""
    return generate(split, count, EMBEDDED_SEED)


def _digest(rows: list[dict[str, Any]]) -> str:
    """sha256 of the rows as JSON, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _cut(
    task: task_files.Task, cut: task_files.Cut, rows: list[dict[str, Any]]
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """The numbers of the rows of each split that a cut makes, and what the record says of them.

    Rows of equal text stay in one split, so no scored row is in another. Raises `UserError` where there are
    too few rows.
    """
    groups: dict[str, list[int]] = {}
    for number, text in enumerate(overlap.texts(task, _dataset(rows, task.name))):
        groups.setdefault(text, []).append(number)
    texts = list(groups)
    import torch  # here: a wrong --source is told before anything heavy is imported

    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(cut.seed)).tolist()
    if (needed := sum(cut.parts.values())) >= len(texts):
        raise UserError(
            f'split "{cut.of}" has {len(texts)} distinct rows; the task cuts off {needed} of them'
        )
    chosen: dict[str, list[int]] = {}
    for name, count in cut.parts.items():
        chosen[name] = [groups[texts[i]][0] for i in order[:count]]
        order = order[count:]
    chosen[cut.rest] = [number for i in order for number in groups[texts[i]]]
    splits = {s: {"sha256": _digest([rows[i] for i in ns]), "rows": len(ns)} for s, ns in chosen.items()}
    return chosen, {"of": cut.of, "seed": cut.seed, "splits": splits}


def _read_mirror(query: _Query, mirror: Path | None) -> SplitRows:
    """Rows of a local mirror. Raises `NoRows` where it lacks a split that is not optional."""
    folder = mirror / _folder_name(query.path) / _folder_name(query.name or "default")
    rows_of_split, files = {}, {}
    for split in query.splits:
        path = folder / f"{_folder_name(split)}.jsonl"
        other = folder / f"{_folder_name(query.stand_in.get(split, split))}.jsonl"
        if not path.is_file() and not other.is_file():
            if split in query.optional:
                continue
            present = ", ".join(sorted(p.stem for p in folder.glob("*.jsonl"))) or "nothing"
            raise NoRows(
                f'task "{query.task}": the mirror lacks {path.relative_to(mirror)} (it has {present} there); '
                "three ways out: another --data FOLDER, --source hub, or --model embedded"
            )
        stand_in = {} if path.is_file() else {"stand_in": other.stem}
        path = path if path.is_file() else other
        data = path.read_bytes()
        rows = rows_of_split[split] = _json_lines(data, str(path.relative_to(mirror)))
        files[split] = {"sha256": hashlib.sha256(data).hexdigest(), "rows": len(rows)} | stand_in
    return rows_of_split, {"source": "mirror", "id": query.id, "files": files}


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


def _read_hub(query: _Query, _: Path | None) -> SplitRows:
    """Rows from the Hub, or from its local cache. Raises `NoRows` where neither has them."""
    import datasets

    from peftzoo.models import hub

    offline = not hub.answers(query.path, "dataset")
    if offline:  # what is in the cache still loads
        datasets.config.HF_HUB_OFFLINE = True
    try:
        loaded = datasets.load_dataset(query.path, query.name, **query.kwargs)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = "the Hub cannot be reached" if offline else " ".join(str(error).split())[:120]
        raise NoRows(
            f'no data for task "{query.task}": {why}; three ways out: --data FOLDER (a local mirror, see '
            "README), a machine that reaches the Hub, or --source embedded"
        ) from None
    if missing := [s for s in query.splits if s not in loaded and s not in query.optional]:
        raise NoRows(f'task "{query.task}": {query.path} has no split "{missing[0]}": {", ".join(loaded)}')
    rows = {s: loaded[s].to_list() for s in query.splits if s in loaded}
    files = {s: {"sha256": _digest(r), "rows": len(r)} for s, r in rows.items()}
    return rows, {"source": "hub", "id": query.id, "files": files}


_READERS = {"mirror": _read_mirror, "hub": _read_hub}
