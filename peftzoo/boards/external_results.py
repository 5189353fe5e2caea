"""Result files of HF PEFT's method comparison (its folder `method_comparison`), on a board of their own."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftzoo.boards.formats import escape, markdown_table
from peftzoo.errors import UserError

MAX_FILE_BYTES = 8 * 2**20
"""A larger result file is refused."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(max_length=200)]


class Result(BaseModel):
    """The fields read from one result file; seconds and bytes.

    Measured elsewhere under another protocol, so never in a table with records of this project.
    """

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
    """One result file of a successful run. Raises `UserError` naming the file and the fault."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES // 2**20} MiB")
        raw = json.loads(file.read_bytes())
        json.dumps(raw, ensure_ascii=False).encode()  # a lone surrogate could not be printed
        status = _nested(raw, "train_info", "status")
        if status != "success":
            raise ValueError(f"train_info.status is {json.dumps(status)[:40]}, not success")
        return Result.model_validate(_fields(raw))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
    raise UserError(f"{file}: not a result of HF PEFT's method comparison: {reason}")


def _fields(raw: Any) -> dict[str, Any]:
    """The fields of `Result` from the document; None for what it lacks."""
    train, config = _nested(raw, "train_info"), _nested(raw, "run_info", "train_config")
    metrics = _nested(raw, "train_info", "metrics")
    metrics = [m for m in metrics if isinstance(m, dict)] if isinstance(metrics, list) else []
    last = next((m for m in reversed(metrics) if "test accuracy" in m), {})
    memory = _nested(train, "accelerator_memory_max")
    size = _nested(train, "file_size")
    return {
        "experiment": _nested(raw, "run_info", "experiment_name"),
        "created": _nested(raw, "run_info", "created_at"),
        "model": _nested(config, "model_id"), "device": _nested(raw, "meta_info", "system_info", "gpu"),
        "method": _nested(raw, "run_info", "peft_config", "peft_type") or "full fine-tuning",
        "test_accuracy": last.get("test accuracy"), "forgetting": last.get("forgetting"),
        "trainable_params": _nested(train, "num_trainable_params"),
        "file_bytes": None if size == 99999999 else size,  # its placeholder for unknown
        "memory_reserved_max": _nested(train, "cuda_memory_max") if memory is None else memory,
        "train_seconds": _nested(train, "train_time"), "steps": _nested(config, "max_steps"),
        "lr": _nested(config, "optimizer_kwargs", "lr"), "seed": _nested(config, "seed"),
        "peft_version": _nested(raw, "meta_info", "package_info", "peft-version"),
    }  # fmt: skip


def _nested(value: Any, *keys: str) -> Any:
    """value[key][key]...; None where a key is missing or a level is no dict."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_all(folder: Path) -> list[Result | UserError]:
    """Every JSON file under the folder as a result, or as the `UserError` that says why it is none.

    Raises `UserError` when the folder does not exist or holds no result at all.
    """
    if not folder.is_dir():
        raise UserError(f'--import-peft "{folder}": no such folder')
    results: list[Result | UserError] = []
    for file in sorted(folder.rglob("*.json")):
        try:
            results.append(read(file))
        except UserError as error:
            results.append(error)
    if not any(isinstance(r, Result) for r in results):
        for error in results[:3]:
            raise UserError(f"{error} ({len(results)} files like this)")
        raise UserError(f'--import-peft "{folder}": no JSON files')
    return results


def markdown(results: list[Result]) -> str:
    """The external board as Markdown: a table per model and device, best accuracy first."""
    sections = [
        "# External board\n\n"
        "Imported from result files of HF PEFT's method comparison, measured there and not here: one seed "
        "each, GSM8K test accuracy, so no intervals, tests or ranks. Memory is the largest that the "
        "allocator reserved, over training and scoring together. No run of this project shares these tables."
    ]

    def model_and_device(r: Result) -> tuple[str, str]:
        return r.model, r.device or "unknown device"

    for (model, device), group in groupby(sorted(results, key=model_and_device), model_and_device):
        rows = [{
            "experiment": r.experiment, "type": r.method, "test accuracy": f"{r.test_accuracy:.3f}",
            "forgetting": _fixed(r.forgetting, 3), "trained": f"{r.trainable_params:,}",
            "file MiB": _fixed(r.file_bytes and r.file_bytes / 2**20, 1),
            "reserved GiB": _fixed(r.memory_reserved_max and r.memory_reserved_max / 2**30, 1),
            "train s": _fixed(r.train_seconds, 0), "steps": _fixed(r.steps, 0),
            "lr": "" if r.lr is None else f"{r.lr:g}", "seed": _fixed(r.seed, 0),
            "PEFT": r.peft_version or "",
        } for r in sorted(group, key=lambda r: -r.test_accuracy)]  # fmt: skip
        table = markdown_table(pd.DataFrame(rows).map(escape))
        sections.append(f"## {escape(model)} on {escape(device)} (external)\n\n{table}")
    return "\n\n".join(sections) + "\n"


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
