"""Presets from publications: their hyperparameters (`--preset`), printed parameter counts and scores.

The presets of a method are in a YAML file beside its Python file, under the same name:

    paper-glue-base:
      source: Table 2 of arXiv 2106.09685           # where the publication prints them
      options: {targets: "q,v", r: 8}               # --set
      train: {epochs: 60, batch_size: 16}           # fields of TrainConfig, or epochs instead of steps
      tasks: {sst2: {lr: 5.0e-4}}                   # overrides for one task; may hold `options`
      counts: {roberta-base: 0.3M}                  # trainable parameters as printed; an integer is exact,
                                                    # 0.3% is a share of model plus adapter
      differs: {roberta-base: why our count is another one}
      scores: {roberta-base: {sst2: 95.1}}          # as printed
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from peftzoo import models
from peftzoo.adapters import attach, configure
from peftzoo.contract import registry
from peftzoo.errors import UserError, unknown
from peftzoo.training.config import TrainConfig

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "%": 1e-2}


class Preset(BaseModel):
    """One published setting: an entry of the YAML file, with the keys shown above.

    Unknown keys, training fields and malformed counts are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=8)
    options: dict[str, Any] = {}
    train: dict[str, Any] = {}
    tasks: dict[str, dict[str, Any]] = {}
    counts: dict[str, int | str] = {}
    differs: dict[str, str] = {}
    scores: dict[str, dict[str, float]] = {}

    @field_validator("train")
    @classmethod
    def _check_train(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _check_train_fields(value)

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for fields in value.values():
            if not isinstance(fields.get("options", {}), dict):
                raise ValueError(f"options {fields['options']}: a table of options")
            _check_train_fields(_without_options(fields))
        return value

    @field_validator("counts")
    @classmethod
    def _check_counts(cls, value: dict[str, int | str]) -> dict[str, int | str]:
        for printed in value.values():
            parse_count(printed)
        return value

    def options_for(self, task: str) -> dict[str, Any]:
        """The method's options for one task: the preset's own, overridden by those of the task."""
        return self.options | self.tasks.get(task, {}).get("options", {})

    def train_fields_for(self, task: str, overrides: dict[str, Any]) -> dict[str, Any]:
        """Values of `TrainConfig` fields (or `epochs`) for one task; the user's `overrides` come last."""
        fields = self.train | _without_options(self.tasks.get(task, {}))
        if overrides.keys() & {"steps", "epochs"}:  # either one sets the length
            fields = {k: v for k, v in fields.items() if k not in ("steps", "epochs")}
        return fields | overrides


def _without_options(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k != "options"}


def _check_train_fields(train: dict[str, Any]) -> dict[str, Any]:
    known = {*TrainConfig.model_fields, "epochs"}
    if surplus := train.keys() - known:
        raise ValueError(f"{min(surplus)} is no training setting: {', '.join(sorted(known))}")
    TrainConfig(**{k: v for k, v in train.items() if k != "epochs"})
    return train


NONE = Preset(source="no publication")
"""The empty preset of a run without `--preset`."""


def parse_count(printed: int | str) -> tuple[float, float]:
    """A printed count as its value and half a unit of its last digit: "0.3M" -> (3e5, 5e4), 7 -> (7.0, 0.0).

    Raises `ValueError` for text of another form.
    """
    if isinstance(printed, int):
        return float(printed), 0.0
    if not (match := re.fullmatch(r"(\d+)(?:\.(\d+))?([KMB%]?)", printed)):
        raise ValueError(f'count "{printed}": an integer, or digits with K, M, B or % such as 0.3M')
    integer, decimals, unit = match[1], match[2] or "", match[3]
    return float(f"{integer}.{decimals or 0}") * _UNITS[unit], 0.5 * 10 ** -len(decimals) * _UNITS[unit]


def agrees(printed: int | str, counted: int, model_params: int = 0) -> bool:
    """Whether the counted number of trainable parameters rounds to the printed one.

    `model_params`: parameters of the base model, for a printed percentage.
    """
    value, half_unit = parse_count(printed)
    number = counted / (model_params + counted) if str(printed).endswith("%") else counted
    return abs(number - value) <= half_unit + 1e-12 * value


@cache
def presets(cls: type) -> dict[str, Preset]:
    """The published settings of a method class, by name. Raises `UserError` naming file, preset and key."""
    file = Path(inspect.getfile(cls)).with_suffix(".yaml")
    if not file.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, Preset]).validate_python(yaml.safe_load(file.read_text()) or {})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file.name}: not YAML: {' '.join(str(error).split())}") from None


def get(cls: type, name: str) -> Preset:
    """One preset of a method class. Raises `UserError` with the nearest known name."""
    known = presets(cls)
    if name not in known:
        raise unknown(f'preset of method "{cls.name}"', name, known)
    return known[name]


def counts(methods: list[str]) -> list[dict[str, Any]]:
    """One row per method, preset and model: the printed count, the one counted here, whether they agree.

    Counting needs no weights: the models are on the meta device.
    """
    rows = []
    for method in methods:
        cls = registry.get(method)
        for name, preset in presets(cls).items():
            for model, printed in preset.counts.items():
                handle = attach(_meta_model(model), configure(cls, preset.options))
                counted = handle.trainable_count()
                rows.append({
                    "name": f"{method}/{name}/{model}", "status": "ok", "method": method, "preset": name,
                    "model": model, "printed": printed, "trainable_params": counted,
                    "agrees": agrees(printed, counted, _parameter_count(model)),
                    "reason": preset.differs.get(model), "source": preset.source,
                })  # fmt: skip
                handle.detach()
    return rows


@cache
def _meta_model(model: str) -> Any:
    return models.on_meta(model)


@cache
def _parameter_count(model: str) -> int:
    return sum(p.numel() for p in _meta_model(model).parameters())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows of `counts` as a Markdown page (`results/paper_counts.md`)."""
    agree = sum(r["agrees"] for r in rows)
    lines = [
        "# Trainable parameters: printed and counted here",
        "",
        f"{len(rows)} printed counts, {agree} of them ours too when rounded alike. Classifier heads",
        "are never counted here; a percentage is a share of model and adapter together. Made by",
        "`peftzoo params --published -m all --out results/paper_counts.md`.",
        "",
        "| method | preset | model | printed | here | | source |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for r in rows:
        printed = f"{r['printed']:,}" if isinstance(r["printed"], int) else r["printed"]
        verdict = "equal" if r["agrees"] else f"differs: {r['reason'] or 'no reason known'}"
        cells = (
            r["method"],
            r["preset"],
            r["model"],
            printed,
            f"{r['trainable_params']:,}",
            verdict,
            r["source"],
        )
        lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"
