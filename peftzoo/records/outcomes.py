"""The side file of a record: what became of every scored row, as paired tests need it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zlib
from gzip import BadGzipFile, GzipFile
from typing import Any

import numpy as np

from peftzoo.errors import UserError
from peftzoo.records.schema import Record
from peftzoo.records.statistics import METRICS, Sample, share

LARGEST = 256 * 2**20
"""Bytes of an unpacked side file, at most."""


def read(record: Record) -> list[dict[str, Any]]:
    """One entry per scored row and filter. Raises `UserError` naming the file and what is wrong with it."""
    if not record.examples or not record.file:
        return []
    file = record.file.with_suffix(".examples.jsonl.gz")
    try:
        if record.examples.get("file") != file.name:
            raise ValueError("the record names another file")
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != record.examples.get("sha256"):
            raise ValueError("its sha256 is not the one in the record")
        text = GzipFile(fileobj=io.BytesIO(data)).read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"more than {LARGEST // 2**20} MiB")
        found = json.loads(b"[" + b",".join(text.splitlines()) + b"]")
        if not all(isinstance(o, dict) for o in found):
            raise ValueError("a line is not an object")
    except (OSError, EOFError, BadGzipFile, zlib.error, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise UserError(f"{file}: not the outcomes of its record: {reason}") from None
    return found


def sample(record: Record) -> Sample | None:
    """What the record's score is made of, row by row; None where the side file does not tell."""
    found = read(record)
    if not found or record.result is None:
        return None
    parts = _by_task(found) if record.result.metric == "mean" else {None: found}
    made = []
    for task, outcomes in parts.items():
        metric = record.result.metric if task is None else _metric(record, task)
        if (one := _sample(outcomes, metric)) is None:
            return None
        made.append((task, one))
    if len(made) == 1:
        return made[0][1]
    if any(s.of is not METRICS["acc"][1] for _, s in made):
        return None
    n = sum(len(s.rows) for _, s in made)  # rows weigh so that their plain mean is the mean over tasks
    weighted = [s.parts * n / (len(made) * len(s.rows)) for _, s in made]
    return Sample(tuple((t, r) for t, s in made for r in s.rows), np.concatenate(weighted))


def _by_task(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    parts: dict[str, list[dict[str, Any]]] = {}
    for o in found:
        parts.setdefault(str(o.get("task")), []).append(o)
    return parts


def _metric(record: Record, task: str) -> str:
    """The main metric of one of several tasks: the first that the score names for it."""
    named = [k for k in record.result.others if k.startswith(f"{task}/")]
    return named[0].removeprefix(f"{task}/") if named else ""


def _sample(found: list[dict[str, Any]], metric: str) -> Sample | None:
    name, _, kind = metric.partition(",")
    mine = [o for o in found if o.get("filter", kind or "none") == (kind or "none")]
    rows = tuple(o.get("row") for o in mine)
    if not mine or not all(type(r) is int for r in rows) or len(set(rows)) < len(rows):
        return None
    if (values := _numbers(mine, name)) is not None:
        return Sample(rows, share(values))
    answers, references = _numbers(mine, "answer"), _numbers(mine, "reference")
    if answers is None or references is None or name not in METRICS:
        return None
    parts, of = METRICS[name]
    return Sample(rows, parts(answers, references), of)


def _numbers(found: list[dict[str, Any]], key: str) -> np.ndarray | None:
    values = [o.get(key) for o in found]
    good = all(isinstance(v, (int, float)) and abs(v) < 1e15 and math.isfinite(v) for v in values)
    return np.array(values, float) if good else None
