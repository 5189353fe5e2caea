"""Results that others measured, on a board of their own: the result files of HF PEFT's method comparison."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftzoo.boards.formats import escape, grid
from peftzoo.errors import UserError

LARGEST = 8 * 2**20
"""Bytes of a result file, at most."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(max_length=200)]


class Result(BaseModel):
    """What is kept of one result file. Measured elsewhere, by other rules: never in a table with records."""

    model_config = ConfigDict(allow_inf_nan=False)

    origin: Text = "HF PEFT method_comparison"
    experiment: Text
    created: Text
    model: Text
    device: Text | None
    method: Text
    test_accuracy: float = Field(ge=0, le=1)
    forgetting: float | None
    trainable_params: Count
    file_bytes: Count | None
    memory_reserved_max: Count | None
    train_seconds: float | None = Field(ge=0)
    steps: Count | None
    lr: float | None
    seed: Count | None
    peft_version: Text | None


def read(file: Path) -> Result:
    """One result file. Raises `UserError` naming it and what is wrong."""
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST // 2**20} MiB")
        raw = json.loads(file.read_bytes())
        json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair could not be shown
        status = _at(raw, "train_info", "status")
        if status != "success":
            raise ValueError(f"train_info.status is {json.dumps(status)[:40]}, not success")
        return Result.model_validate(_facts(raw))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
    raise UserError(f"{file}: not a result of HF PEFT's method comparison: {reason}")


def _facts(raw: Any) -> dict[str, Any]:
    train, config = _at(raw, "train_info"), _at(raw, "run_info", "train_config")
    metrics = _at(raw, "train_info", "metrics")
    metrics = [m for m in metrics if isinstance(m, dict)] if isinstance(metrics, list) else []
    last = next((m for m in reversed(metrics) if "test accuracy" in m), {})
    memory = _at(train, "accelerator_memory_max")
    size = _at(train, "file_size")
    return {
        "experiment": _at(raw, "run_info", "experiment_name"), "created": _at(raw, "run_info", "created_at"),
        "model": _at(config, "model_id"), "device": _at(raw, "meta_info", "system_info", "gpu"),
        "method": _at(raw, "run_info", "peft_config", "peft_type") or "full fine-tuning",
        "test_accuracy": last.get("test accuracy"), "forgetting": last.get("forgetting"),
        "trainable_params": _at(train, "num_trainable_params"),
        "file_bytes": None if size == 99999999 else size,  # its mark for unknown
        "memory_reserved_max": _at(train, "cuda_memory_max") if memory is None else memory,
        "train_seconds": _at(train, "train_time"), "steps": _at(config, "max_steps"),
        "lr": _at(config, "optimizer_kwargs", "lr"), "seed": _at(config, "seed"),
        "peft_version": _at(raw, "meta_info", "package_info", "peft-version"),
    }  # fmt: skip


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_all(folder: Path) -> list[Result | UserError]:
    """Every result file under the folder, or what is wrong with it."""
    if not folder.is_dir():
        raise UserError(f'--import-peft "{folder}": no such folder')
    found: list[Result | UserError] = []
    for file in sorted(folder.rglob("*.json")):
        try:
            found.append(read(file))
        except UserError as error:
            found.append(error)
    if not any(isinstance(f, Result) for f in found):
        for error in found[:3]:
            raise UserError(f"{error} ({len(found)} files like this)")
        raise UserError(f'--import-peft "{folder}": no JSON files')
    return found


def markdown(results: list[Result]) -> str:
    """A table per model and device."""
    parts = [
        "# External board\n\n"
        "Imported from result files of HF PEFT's method comparison, measured there and not here: one seed "
        "each, GSM8K test accuracy, so no intervals, tests or ranks. Memory is the largest that the "
        "allocator reserved, over training and scoring together. No run of this project shares these tables."
    ]

    def place(r: Result) -> tuple[str, str]:
        return r.model, r.device or "unknown device"

    for (model, device), group in groupby(sorted(results, key=place), place):
        rows = [{
            "experiment": r.experiment, "type": r.method, "test accuracy": f"{r.test_accuracy:.3f}",
            "forgetting": _number(r.forgetting, 3), "trained": f"{r.trainable_params:,}",
            "file MiB": _number(r.file_bytes and r.file_bytes / 2**20, 1),
            "reserved GiB": _number(r.memory_reserved_max and r.memory_reserved_max / 2**30, 1),
            "train s": _number(r.train_seconds, 0), "steps": _number(r.steps, 0),
            "lr": "" if r.lr is None else f"{r.lr:g}", "seed": _number(r.seed, 0),
            "PEFT": r.peft_version or "",
        } for r in sorted(group, key=lambda r: -r.test_accuracy)]  # fmt: skip
        shown = pd.DataFrame(rows).map(escape)
        parts.append(f"## {escape(model)} on {escape(device)} (external)\n\n{grid(shown)}")
    return "\n\n".join(parts) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
