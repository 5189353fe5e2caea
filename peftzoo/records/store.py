"""Records on disk: one JSON per run; where it lies, how it is written and read."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftzoo.adapters import write_atomically
from peftzoo.errors import UserError
from peftzoo.records.schema import Record

FOLDERS = {"ok": "records", "failed": "failed", "cancelled": "cancelled"}
"""Good records lie apart from the others."""
LOCKS = "locks"
"""Every results folder has it: whoever does a run holds its lock."""


def identity(parts: dict[str, Any]) -> str:
    """12 hexadecimal digits that name a configuration."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def slug(name: str) -> str:
    """A name as one folder name: letters, digits, dot, dash, underscore; never hidden, never a path."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name.replace("/", "__")).strip(".-") or "unnamed"
    return plain if len(plain) <= 80 else f"{plain[:67]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def path(out: Path, record: Record) -> Path:
    """<out>/<records|failed|cancelled>/<suite>/<task>/<model>/<method>/<id>-s<seed>.json"""
    parts = (record.suite, record.task, record.model, record.method)
    return out.joinpath(FOLDERS[record.status], *map(slug, parts), f"{record.id}-s{record.seed}.json")


def write(out: Path, record: Record, outcomes: list[dict[str, Any]] | None = None) -> Path:
    """Write the record and, beside it, the compressed outcomes; both atomically, the record last.

    The record gets the checksums of both.
    """
    target = path(out, record)
    if outcomes:
        lines = "\n".join(json.dumps(o, sort_keys=True) for o in outcomes).encode()
        data = gzip.compress(lines, mtime=0)
        side = target.with_suffix(".examples.jsonl.gz")
        write_atomically(side, data)
        record.examples = {"file": side.name, "sha256": hashlib.sha256(data).hexdigest()}
    record.sha256, record._file = seal(json.loads(record.model_dump_json())), target
    write_atomically(target, (record.model_dump_json(indent=1) + "\n").encode())
    return target


def supersede(out: Path, record: Record) -> None:
    """Remove what an earlier try of the same run left among the failed and cancelled ones."""
    for status in FOLDERS.keys() - {"ok", record.status}:
        path(out, record.model_copy(update={"status": status})).unlink(missing_ok=True)


def seal(document: dict[str, Any]) -> str:
    """The checksum of a record's document: of all but the checksum itself."""
    rest = {k: v for k, v in document.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(file: Path) -> Record:
    """One record, checked; one without a checksum is older than these. Raises `UserError` naming the file and
    what is wrong, and for one that was changed after it was written."""
    try:
        raw = json.loads(file.read_bytes(), parse_constant=_finite, parse_float=_finite)
        json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair could not be shown
        record = Record.model_validate(raw)
        if record.sha256 not in (None, seal(raw)):
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


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def read_all(out: Path) -> Iterator[Record | UserError]:
    """Every good record under `out/records` (or under `out` itself); a file that is none yields its error."""
    root = out / FOLDERS["ok"]
    for file in sorted((root if root.is_dir() or (out / LOCKS).is_dir() else out).rglob("*.json")):
        try:
            yield read(file)
        except UserError as error:
            yield error
