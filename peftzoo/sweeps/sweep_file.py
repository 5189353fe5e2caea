"""The format of a sweep file, and the runs that it expands to."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from peftzoo.contract import registry
from peftzoo.errors import UserError, nearest, unknown
from peftzoo.runs import quick_checks
from peftzoo.tasks import task_files
from peftzoo.training.config import TrainConfig
from peftzoo.units import parse_pack_size

if TYPE_CHECKING:
    from peftzoo.runs.plan import Request

TRAIN_KEYS = {*TrainConfig.model_fields, "epochs"} - {"precision"}
SEARCHABLE_KEYS = {"lr", "head_lr", "schedule", "warmup", "clip"}
"""Training settings that a search may change: those that do not change the cost of a trial."""


def _as_list(value: Any) -> Any:
    """A list of names or numbers without repetitions, from a list or a comma-separated string."""
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        value = [part.strip() for part in str(value).split(",") if part.strip()]
    return list(dict.fromkeys(value)) if isinstance(value, list) and _all_scalars(value) else value


def _all_scalars(values: list[Any]) -> bool:
    return all(isinstance(v, (str, int)) for v in values)


Names = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], BeforeValidator(_as_list), Field(min_length=1)]


class _Strict(BaseModel):
    """A model that refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Range(_Strict):
    """Numbers from `low` to `high`; integers if both ends are integers."""

    low: int | float
    high: int | float
    log: bool = False

    @field_validator("high")
    @classmethod
    def _above(cls, high: float, info: Any) -> float:
        if high <= info.data.get("low", high - 1):
            raise ValueError("above low")
        return high


class Search(_Strict):
    """A hyperparameter search: for every method `trials` runs of `steps`, scored on held-out training rows.

    `rows` of each task are held out. With `seconds`, no trial starts once the trials have trained for so
    long. Without `space`, the learning rate is searched from a tenth of the method's default to ten times it.
    `by: loss` compares the loss on the held-out rows, and scores nothing. `lr_grid` in place of `trials` is
    the search of `lr_grid.LrGrid`, by loss. By loss `rows` and `seed` are 1000 unless given, and never more
    than half of the rows are held out.
    """

    trials: int | None = Field(None, ge=1, le=10_000)
    lr_grid: int | None = Field(None, ge=2, le=25)
    by: Literal["score", "loss"] = "score"
    steps: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)
    sampler: Literal["random", "tpe"] = "tpe"
    space: dict[str, Range | Annotated[list[Any], Field(min_length=1)]] = {}
    rows: int = Field(200, ge=2)
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_loss(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or (raw.get("lr_grid") is None and raw.get("by") != "loss"):
            return raw
        return {"by": "loss", "rows": 1000, "seed": 1000} | raw

    @model_validator(mode="after")
    def _one_kind(self) -> Search:
        if (self.trials is None) == (self.lr_grid is None):
            raise ValueError("give either trials or lr_grid")
        others = {"sampler", "space", "seconds"} & self.model_fields_set
        if self.lr_grid and others:
            raise ValueError(f"{min(others)} is for trials: leave it out beside lr_grid")
        if self.lr_grid and self.by == "score":
            raise ValueError("an lr_grid is searched by loss: leave out by")
        return self


class Sweep(_Strict):
    """The keys of a sweep file. A list under `set`, `train` or `steps` is a grid of its values."""

    methods: Names
    tasks: Names
    models: Names = ["embedded"]
    seeds: Seeds = [0]
    steps: Any = None
    limit: int | None = None
    set: dict[str, Any] = {}
    train: dict[str, Any] = {}
    source: str | None = None
    data: str | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    protocol: str | None = None
    prune: str | None = None
    max_new_tokens: int | None = None
    save_every: int = 50
    hold_out: int | None = Field(None, ge=1)
    early_stop: int | None = None
    pack: str = "1"
    search: Search | None = None

    @field_validator("pack", mode="before")
    @classmethod
    def _pack(cls, value: Any) -> str:
        parse_pack_size("pack", str(value))
        return str(value)

    @property
    def selects_by_group(self) -> bool:
        """Whether `all` or a group selects methods or tasks; what does not fit together is then skipped."""
        return "all" in self.methods or "all" in self.tasks or task_files.expand(self.tasks) != self.tasks

    def requests(self) -> list[Request]:
        """Every run once, in the order of tasks, models, methods with their grids, and seeds."""
        from peftzoo.runs.plan import Request  # here: a wrong file is told before anything heavy is imported

        methods = registry.methods() if "all" in self.methods else self.methods
        options, train = self._options(methods), self._train()
        common = self.model_dump(
            include={
                "limit",
                "source",
                "data",
                "precision",
                "protocol",
                "prune",
                "max_new_tokens",
                "save_every",
                "early_stop",
            }
        ) | {"validation": self.hold_out}
        tasks = task_files.expand(task_files.tasks() if "all" in self.tasks else self.tasks)
        requests = [
            Request(method=m, task=t, model=model, seed=s, options=o, train=g, **common)
            for t in tasks
            for model in self.models
            for m in methods
            for o in grid(options[m])
            for g in grid(train)
            for s in self.seeds
        ]
        return [*{repr(r): r for r in requests}.values()]

    def _options(self, methods: list[str]) -> dict[str, dict[str, Any]]:
        """Options per method; `lora.r: 4`, or `lora: {r: 4}`, overrides what is set for all."""
        own = {f"{k}.{o}": v for k, vs in self.set.items() if isinstance(vs, dict) for o, v in vs.items()}
        rest = {k: v for k, v in self.set.items() if not isinstance(v, dict)}
        options = {m: {k: v for k, v in rest.items() if "." not in k} for m in methods}
        for key, value in ({k: v for k, v in rest.items() if "." in k} | own).items():
            method, _, option = key.rpartition(".")
            if method not in options:
                raise unknown(f'method in set "{key}"', method, options)
            options[method][option] = value
        return options

    def _train(self) -> dict[str, Any]:
        """The training settings with `steps`. Raises `UserError` for an unknown key or two values of it."""
        for key in self.train:
            if key not in TRAIN_KEYS:
                raise UserError(
                    f'unknown key "train.{key}": {nearest(key, TRAIN_KEYS) or _allowed(TRAIN_KEYS)}'
                )
        if self.steps is None:
            return self.train
        if duplicates := {"steps", "epochs"} & self.train.keys():
            raise UserError(f"steps and train.{min(duplicates)} say the same: keep one of them")
        return self.train | {"steps": self.steps}

    def check_values(self) -> None:
        """Raise the `UserError` of a value that can be told to be wrong in a moment (`quick_checks`)."""
        if "all" not in self.methods:
            quick_checks.check_methods(self.methods)
        if "all" not in self.tasks:
            quick_checks.check_tasks(self.tasks)
            quick_checks.check_protocol(self.protocol, task_files.expand(self.tasks))
        if not self.selects_by_group:
            for model in self.models:
                quick_checks.check_model(model)
                quick_checks.check_data(model, self.source, self.data)
        quick_checks.check_model(None, self.prune)
        for settings in grid(self._train()):
            quick_checks.check_training(settings)

    def check_search(self) -> None:
        """Raise `UserError` for a grid or held-out rows beside the search, or a wrong key in its space."""
        for key in ("hold_out", "early_stop"):
            if getattr(self, key) is not None:
                raise UserError(f"{key} and search: a search holds rows of its own out; keep one of them")
        grids = [f"set.{k}" for k, v in self.set.items() if _has_list(v)]
        grids += [f"train.{k}" for k, v in (self.train | {"steps": self.steps}).items() if _has_list(v)]
        if grids:
            raise UserError(f"{grids[0]} is a list and there is a search: put its values into search.space")
        methods = registry.methods() if "all" in self.methods else self.methods
        for key, values in self.search.space.items():
            option, dot, name = key.partition(".")
            if not (dot and option == "set" and name) and key not in SEARCHABLE_KEYS:
                known = {*SEARCHABLE_KEYS, "set.OPTION"}
                raise UserError(f'unknown key "search.space.{key}": {nearest(key, known) or _allowed(known)}')
            if (method := name.rpartition(".")[0]) and method not in methods:
                raise unknown(f'method in search.space "{key}"', method, methods)
            if isinstance(values, Range) and values.log and values.low <= 0:
                raise UserError(f"search.space.{key}: low {values.low} on a log scale: above 0")


def _has_list(value: Any) -> bool:
    """Whether the value is a list, or a mapping that contains one."""
    return any(map(_has_list, value.values())) if isinstance(value, dict) else isinstance(value, list)


def grid(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values; a list stands for each of its items."""
    choices = [v if isinstance(v, list) else [v] for v in settings.values()]
    return [dict(zip(settings, values, strict=True)) for values in itertools.product(*choices)]


def read(path: Path) -> Sweep:
    """Read and check a sweep file. Raises `UserError` with the file, the key and what is allowed."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f'sweep file "{path}": {error.strerror}') from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f'sweep file "{path.name}": not plain YAML ({" ".join(str(error).split())})'
        ) from None
    if not isinstance(raw, dict):
        raise UserError(f'sweep file "{path.name}": needs keys: {_allowed(Sweep.model_fields)}')
    try:
        sweep = Sweep.model_validate(raw)
        if sweep.search:
            sweep.check_search()
        sweep.check_values()
        sweep.requests()
        return sweep
    except ValidationError as error:
        raise UserError(f'sweep file "{path.name}": {_first_error(error)}') from None
    except UserError as error:
        raise UserError(f'sweep file "{path.name}": {error}') from None


def _allowed(names: Iterable[str]) -> str:
    """The allowed keys, for an error message."""
    return "allowed: " + ", ".join(sorted(names))


def _first_error(error: ValidationError) -> str:
    """The first error of a validation, with key, value and what is allowed."""
    e = error.errors()[0]
    path = [str(p) for p in e["loc"] if str(p) not in ("Range", "int", "float") and "[" not in str(p)]
    key = ".".join(path) or "file"
    if e["type"] == "extra_forbidden":
        model = {1: Sweep, 2: Search}.get(len(path), Range)
        return f'unknown key "{key}": {nearest(path[-1], model.model_fields) or _allowed(model.model_fields)}'
    value = f" (given: {e['input']!r})" if e["type"] != "missing" and not isinstance(e["input"], dict) else ""
    return f"{key}: {e['msg'].removeprefix('Value error, ')}{value}"
