"""Records on disk: one JSON file per run. Paths, writing, reading and checksums."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftzoo.adapters import write_atomically
from peftzoo.errors import UserError, nearest
from peftzoo.records.schema import Record

FOLDERS = {"ok": "records", "failed": "failed", "cancelled": "cancelled"}
"""Folder of a record by its status: boards read the first one only."""
RUNS = Path("runs")
"""Where commands write records unless told otherwise."""
LOCKS = "locks"
"""Subfolder of every results folder: a process holds a run's lock file while it executes that run."""


def identity(settings: dict[str, Any]) -> str:
    """The id of a configuration: 12 hexadecimal digits of a hash that ignores the order of the keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def slug(name: str) -> str:
    """A name as one folder name: letters, digits, dot, dash, underscore; never hidden, never a path.

    At most 80 characters; a longer name is cut and ends in a hash, so that two long names stay different.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name.replace("/", "__")).strip(".-") or "unnamed"
    return plain if len(plain) <= 80 else f"{plain[:67]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def path(out: Path, record: Record) -> Path:
    """<out>/<records|failed|cancelled>/<suite>/<task>/<model>/<method>/<id>-s<seed>.json"""
    parts = (record.suite, record.task, record.model, record.method)
    return out.joinpath(FOLDERS[record.status], *map(slug, parts), f"{record.id}-s{record.seed}.json")


def write(out: Path, record: Record, outcomes: list[dict[str, Any]] | None = None) -> Path:
    """Write the record and, beside it, the outcomes as gzip-compressed JSON lines; returns the record's path.

    Both are written atomically, the record last. The record receives the checksums of both files.
    """
    target = path(out, record)
    if outcomes:
        lines = "\n".join(json.dumps(o, sort_keys=True) for o in outcomes).encode()
        data = gzip.compress(lines, mtime=0)
        side = target.with_suffix(".examples.jsonl.gz")
        write_atomically(side, data)
        record.examples = {"file": side.name, "sha256": hashlib.sha256(data).hexdigest()}
    record.sha256, record._file = checksum(json.loads(record.model_dump_json())), target
    write_atomically(target, (record.model_dump_json(indent=1) + "\n").encode())
    return target


def supersede(out: Path, record: Record) -> None:
    """Remove the failed or cancelled record that an earlier attempt of the same run left."""
    for status in FOLDERS.keys() - {"ok", record.status}:
        path(out, record.model_copy(update={"status": status})).unlink(missing_ok=True)


def checksum(document: dict[str, Any]) -> str:
    """The sha256 of a record's JSON object without its own `sha256` field: keys sorted, no spaces."""
    content = {k: v for k, v in document.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(file: Path) -> Record:
    """One record, validated; a record without a checksum (older than checksums) is accepted.

    Raises `UserError` naming the file and the fault; also for a record that was edited after it was written.
    """
    try:
        raw = json.loads(file.read_bytes(), parse_constant=_finite_float, parse_float=_finite_float)
        json.dumps(raw, ensure_ascii=False).encode()  # a lone surrogate could not be printed
        record = Record.model_validate(raw)
        if record.sha256 not in (None, checksum(raw)):
            raise UserError(
                f"{file}: not a record as it was written: its sha256 is another; restore it, or make it anew "
                "(--force)"
            )
        record._file = file
        return record
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        raise UserError(f"{file}: not a record: {key}: {first['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a record: {' '.join(str(error).split())[:160]}") from None


def _finite_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def published_folder() -> Path | None:
    """The records that come with peftzoo: `results/` of a source checkout or of the installed package."""
    import peftzoo

    places = (Path(place) / "results" for place in peftzoo.__path__)
    return next((p for p in places if (p / FOLDERS["ok"]).is_dir()), None)


def folders_with_records() -> list[Path]:
    """Where a command looks for records when no folder is named: `runs`, `results`, the published ones."""
    places = [RUNS, Path("results"), published_folder()]
    found = [p for p in places if p is not None and any((p / FOLDERS["ok"]).rglob("*.json"))]
    return list({p.resolve(): p for p in reversed(found)}.values())[::-1]


def read_all(out: Path) -> Iterator[Record | UserError]:
    """Every record under `out/records`, or under `out` where that is no results folder, in order of path.

    A file that cannot be read as a record yields its `UserError` instead.
    """
    root = out / FOLDERS["ok"]
    for file in sorted((root if root.is_dir() or (out / LOCKS).is_dir() else out).rglob("*.json")):
        try:
            yield read(file)
        except UserError as error:
            yield error


def find(reference: str, folders: Iterable[Path]) -> Record:
    """The one record that `reference` names: its file, or the run's name or id (`0123456789ab`, or with its
    seed `0123456789ab-s0`) among the good records of `folders`, of which the first that knows it decides.

    Raises `UserError` where there is none, and where several in one folder fit.
    """
    if Path(reference).is_file():
        return read(Path(reference))
    names: set[str] = set()
    for folder in folders:
        records = [r for r in read_all(folder) if isinstance(r, Record)]
        names |= {r.name for r in records}
        fitting = [r for r in records if reference in (r.name, r.id, f"{r.id}-s{r.seed}")]
        if len(fitting) > 1:
            files = ", ".join(str(r.file) for r in fitting)
            raise UserError(f'"{reference}" names {len(fitting)} runs: name one of {files}')
        if fitting:
            return fitting[0]
    hint = nearest(reference, names) or "`peftzoo board` shows what there is"
    raise UserError(f'"{reference}" is no file and no run on record: {hint}')
