"""The side file of a record: the outcome of every scored row, which paired tests and the bootstrap need."""

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
from peftzoo.records.metric_terms import METRICS, Sample, mean_terms
from peftzoo.records.schema import Record

MAX_UNPACKED_BYTES = 256 * 2**20
"""A larger side file is refused, so that a small gzip file cannot fill the memory."""


def read(record: Record) -> list[dict[str, Any]]:
    """One entry per scored row and filter; empty where the record has no side file.

    Raises `UserError` naming the file and the fault: missing, damaged, too large, or not the record's own.
    """
    if not record.examples or not record.file:
        return []
    file = record.file.with_suffix(".examples.jsonl.gz")
    try:
        if record.examples.get("file") != file.name:
            raise ValueError("the record names another file")
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != record.examples.get("sha256"):
            raise ValueError("its sha256 is not the one in the record")
        text = GzipFile(fileobj=io.BytesIO(data)).read(MAX_UNPACKED_BYTES + 1)
        if len(text) > MAX_UNPACKED_BYTES:
            raise ValueError(f"more than {MAX_UNPACKED_BYTES // 2**20} MiB")
        entries = json.loads(b"[" + b",".join(text.splitlines()) + b"]")
        if not all(isinstance(o, dict) for o in entries):
            raise ValueError("a line is not an object")
    except (OSError, EOFError, BadGzipFile, zlib.error, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise UserError(f"{file}: not the outcomes of its record: {reason}") from None
    return entries


TOLERANCE = 1e-4
"""Between a score and the score of its outcomes."""


def sample(record: Record, check_score: bool = True) -> Sample | None:
    """The terms per row behind the record's score, for paired tests; None where the side file lacks them.

    For a task group's mean score, rows are weighted so that their plain mean is the mean over tasks. Raises
    `UserError` as `read` does, and, unless not `check_score`, where they do not give the record's score.
    """
    entries = read(record)
    if not entries or record.result is None:
        return None
    found = _sample(record, entries)
    score = record.result.value if check_score else None
    if found is not None and score is not None and not abs(found.value() - score) <= TOLERANCE:
        raise UserError(
            f"{record.file}: its outcomes give {found.value():.4f}, its score is {score:.4f}: "
            "make the run again"
        )
    return found


def _sample(record: Record, entries: list[dict[str, Any]]) -> Sample | None:
    """The terms per row, whether or not they give the score."""
    by_task = _by_task(entries) if record.result.metric == "mean" else {None: entries}
    samples = []
    for task, task_entries in by_task.items():
        metric = record.result.metric if task is None else _task_metric(record, task)
        if (task_sample := _task_sample(task_entries, metric)) is None:
            return None
        samples.append((task, task_sample))
    if len(samples) == 1:
        return samples[0][1]
    if any(s.metric is not METRICS["acc"][1] for _, s in samples):
        return None
    n = sum(len(s.rows) for _, s in samples)
    weighted = [s.terms * n / (len(samples) * len(s.rows)) for _, s in samples]
    return Sample(tuple((t, r) for t, s in samples for r in s.rows), np.concatenate(weighted))


def commonest_answer(record: Record) -> float | None:
    """The score of always giving the commonest reference; None where the outcomes do not hold references.

    They hold them for heads, and imply them for a choice between two answers. Raises `UserError` as `read`.
    """
    entries = read(record)
    if not entries or record.result is None or any("task" in o for o in entries):
        return None
    name = record.result.metric.partition(",")[0]
    references = _numbers(entries, "reference")
    if references is None:
        references = _references_of_choices(entries)
    if references is None or name not in METRICS:
        return None
    if name not in ("acc", "f1"):
        return 0.0  # a constant answer has no correlation
    terms, metric = METRICS[name]
    constant = [terms(np.full(len(references), label), references).mean(0, keepdims=True)
                for label in np.unique(references)]  # fmt: skip
    return float(np.nanmax([metric(means)[0] for means in constant]))


def _references_of_choices(entries: list[dict[str, Any]]) -> np.ndarray | None:
    """(n,): which of two answers is right, from the scores of both and whether the chosen one is right."""
    answers = [o.get("answer") for o in entries]
    right = _numbers(entries, "acc")
    pairs = all(isinstance(a, list) and len(a) == 2 and all(isinstance(v, (int, float)) for v in a)
                for a in answers)  # fmt: skip
    if not pairs or right is None or not np.isin(right, (0, 1)).all():
        return None
    chosen = np.array(answers, float).argmax(1)
    return np.where(right == 1, chosen, 1 - chosen)


def _by_task(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    tasks: dict[str, list[dict[str, Any]]] = {}
    for o in entries:
        tasks.setdefault(str(o.get("task")), []).append(o)
    return tasks


def _task_metric(record: Record, task: str) -> str:
    """The main metric of one task of a group: the first one that the score's `others` lists for the task."""
    named = [k for k in record.result.others if k.startswith(f"{task}/")]
    return named[0].removeprefix(f"{task}/") if named else ""


def _task_sample(entries: list[dict[str, Any]], metric: str) -> Sample | None:
    name, _, filter_name = metric.partition(",")  # lm-eval writes "exact_match,strict-match"
    selected = [o for o in entries if o.get("filter", filter_name or "none") == (filter_name or "none")]
    rows = tuple(o.get("row") for o in selected)
    if not selected or not all(type(r) is int for r in rows) or len(set(rows)) < len(rows):
        return None
    if (values := _numbers(selected, name)) is not None:
        return Sample(rows, mean_terms(values))
    answers, references = _numbers(selected, "answer"), _numbers(selected, "reference")
    if answers is None or references is None or name not in METRICS:
        return None
    terms, metric_of_means = METRICS[name]
    return Sample(rows, terms(answers, references), metric_of_means)


def _numbers(entries: list[dict[str, Any]], key: str) -> np.ndarray | None:
    """(n,): the values under `key`; None where one is missing, not a number, not finite, or 1e15 and more."""
    values = [o.get(key) for o in entries]
    usable = all(isinstance(v, (int, float)) and abs(v) < 1e15 and math.isfinite(v) for v in values)
    return np.array(values, float) if usable else None
