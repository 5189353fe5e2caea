"""Trials of hyperparameter searches on disk: a line of JSON each, in one file per task, model and method.

A trial trains on a part of the training rows and measures the loss on the rest. It is a `Record` whose
`held_out` is set; of it only what a search asks for is kept.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from peftzoo.records.schema import Record, number
from peftzoo.records.store import LOCKS, slug

FOLDER = "trials"


def path(out: Path, record: Record) -> Path:
    """<out>/trials/<suite>/<task>/<model>/<method>.jsonl"""
    folders = map(slug, (record.suite, record.task, record.model))
    return out.joinpath(FOLDER, *folders, f"{slug(record.method)}.jsonl")


def finished(record: Record) -> bool:
    """Whether this is a trial that was trained to its end, or until its loss was not finite."""
    return "loss" in (record.held_out or {})


def find(out: Path, record: Record) -> Record | None:
    """The trial with the id and seed of `record` as it is on record in `out`; None without one."""
    if record.held_out is None or not (file := path(out, record)).is_file():
        return None
    for line in _lines(file):
        if (line.get("id"), line.get("seed")) == (record.id, record.seed) and _is_complete(line):
            return record.model_copy(update={
                "held_out": {k: line[k] for k in ("rows", "start_loss", "loss")},
                "status": "ok" if line["loss"] is not None else "failed",
                "reason": line.get("reason"), "train_seconds": number(line.get("seconds")),
            })  # fmt: skip
    return None


def add(out: Path, record: Record) -> Path:
    """Append the line of a finished trial, unless it is there; returns the file."""
    target = path(out, record)
    if not finished(record):
        return target
    line = {
        "id": record.id, "seed": record.seed, "lr": record.train_config.get("lr"),
        "steps": record.train_config.get("steps"), "config": record.method_config, **record.held_out,
        "seconds": record.train_seconds, "reason": record.reason, "created": record.created,
    }  # fmt: skip
    lock = out / LOCKS / "trials.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if find(out, record):
            return target
        with open(target, "ab+") as file:
            torn = file.tell() and _last_byte(file) != b"\n"  # a program was killed while it wrote
            file.write((b"\n" if torn else b"") + json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    return target


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines that are JSON objects; others, such as one that was half written, are passed over."""
    found = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(text))
        except (ValueError, RecursionError):
            continue
    return [line for line in found if isinstance(line, dict)]


def _is_complete(line: dict[str, Any]) -> bool:
    """Whether the line has its losses, each a number or null."""
    losses = [line.get(k, "") for k in ("start_loss", "loss")]
    return "rows" in line and all(v is None or number(v) is not None for v in losses)
