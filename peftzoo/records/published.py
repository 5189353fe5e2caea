"""What publications used and printed: settings with a name (`--preset`), parameter counts, scores.

They stand in a YAML file beside the method, of the same name, and are data only:

    paper-glue-base:
      source: Table 2 of arXiv 2106.09685           # where the setting and the numbers stand
      options: {targets: "q,v", r: 8}               # --set
      train: {epochs: 60, batch_size: 16}           # fields of TrainConfig, or epochs instead of steps
      tasks: {sst2: {lr: 5.0e-4}}                   # what differs for one task; `options` may be among it
      counts: {roberta-base: 0.3M}                  # trainable parameters as printed; an integer is exact,
                                                    # 0.3% a share of model and adapter together
      differs: {roberta-base: why ours is another number}
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
    """One published setting."""

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
    def _train(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _fields(value)

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for fields in value.values():
            if not isinstance(fields.get("options", {}), dict):
                raise ValueError(f"options {fields['options']}: a table of options")
            _fields(_training(fields))
        return value

    @field_validator("counts")
    @classmethod
    def _counts(cls, value: dict[str, int | str]) -> dict[str, int | str]:
        for printed in value.values():
            spread(printed)
        return value

    def chosen(self, task: str) -> dict[str, Any]:
        """Options of the method for one task."""
        return self.options | self.tasks.get(task, {}).get("options", {})

    def training(self, task: str, given: dict[str, Any]) -> dict[str, Any]:
        """Overrides of `TrainConfig` fields for one task, those `given` by the user last."""
        mine = self.train | _training(self.tasks.get(task, {}))
        if given.keys() & {"steps", "epochs"}:  # each says how long
            mine = {k: v for k, v in mine.items() if k not in ("steps", "epochs")}
        return mine | given


def _training(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k != "options"}


def _fields(train: dict[str, Any]) -> dict[str, Any]:
    known = {*TrainConfig.model_fields, "epochs"}
    if foreign := train.keys() - known:
        raise ValueError(f"{min(foreign)} is no training setting: {', '.join(sorted(known))}")
    TrainConfig(**{k: v for k, v in train.items() if k != "epochs"})
    return train


NONE = Preset(source="no publication")


def spread(printed: int | str) -> tuple[float, float]:
    """A printed count as its value and the half unit of its last digit: "0.3M" -> (3e5, 5e4)."""
    if isinstance(printed, int):
        return float(printed), 0.0
    if not (found := re.fullmatch(r"(\d+)(?:\.(\d+))?([KMB%]?)", printed)):
        raise ValueError(f'count "{printed}": an integer, or digits with K, M, B or % such as 0.3M')
    whole, digits, unit = found[1], found[2] or "", found[3]
    return float(f"{whole}.{digits or 0}") * _UNITS[unit], 0.5 * 10 ** -len(digits) * _UNITS[unit]


def agrees(printed: int | str, ours: int, model: int = 0) -> bool:
    """Whether our count, rounded as the printed one is, is the printed one. `model`: its parameters."""
    value, half = spread(printed)
    number = ours / (model + ours) if str(printed).endswith("%") else ours
    return abs(number - value) <= half + 1e-12 * value


@cache
def presets(cls: type) -> dict[str, Preset]:
    """The published settings of a method, by name. Raises `UserError` naming file, preset and key."""
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
    found = presets(cls)
    if name not in found:
        raise unknown(f'preset of method "{cls.name}"', name, found)
    return found[name]


def counts(methods: list[str]) -> list[dict[str, Any]]:
    """One row per method, preset and model: the printed count, ours, and whether they agree."""
    rows = []
    for method in methods:
        cls = registry.get(method)
        for name, preset in presets(cls).items():
            for model, printed in preset.counts.items():
                ours, size = attach(_bare(model), configure(cls, preset.options)), _size(model)
                rows.append({
                    "name": f"{method}/{name}/{model}", "status": "ok", "method": method, "preset": name,
                    "model": model, "printed": printed, "trainable_params": ours.trainable_count(),
                    "agrees": agrees(printed, ours.trainable_count(), size),
                    "reason": preset.differs.get(model), "source": preset.source,
                })  # fmt: skip
                ours.detach()
    return rows


@cache
def _bare(model: str) -> Any:
    return models.on_meta(model)


@cache
def _size(model: str) -> int:
    return sum(p.numel() for p in _bare(model).parameters())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of `counts` as a page."""
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
