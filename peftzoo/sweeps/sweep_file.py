"""A sweep file: what it may say, and the list of runs that it stands for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from peftzoo.contract import registry
from peftzoo.errors import UserError, nearest, unknown
from peftzoo.runs import packs
from peftzoo.runs.plan import Request
from peftzoo.tasks import task_files
from peftzoo.training.config import TrainConfig

TRAIN = {*TrainConfig.model_fields, "epochs"} - {"precision"}
SEARCHED = {"lr", "head_lr", "schedule", "warmup", "clip"}
"""Training settings that a search may change: those that leave a trial's budget as it is."""


def _listed(value: Any) -> Any:
    """One name, several with commas, or a list."""
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        value = [part.strip() for part in str(value).split(",") if part.strip()]
    return list(dict.fromkeys(value)) if isinstance(value, list) and _plain(value) else value


def _plain(values: list[Any]) -> bool:
    return all(isinstance(v, (str, int)) for v in values)


Names = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], BeforeValidator(_listed), Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Range(_Strict):
    """Numbers from `low` to `high`; whole ones if both are whole."""

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
    """The same budget for every method: `trials` runs of `steps`, scored on held-out training rows.

    With `seconds`, no trial begins once so many have been spent in training. Without `space`, the learning
    rate is searched from a tenth of the method's own to ten times it.
    """

    trials: int = Field(ge=1, le=10_000)
    steps: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)
    sampler: Literal["random", "tpe"] = "tpe"
    space: dict[str, Range | Annotated[list[Any], Field(min_length=1)]] = {}
    rows: int = Field(200, ge=2)
    seed: int = Field(0, ge=0, lt=2**31)


class Sweep(_Strict):
    """The keys of a sweep file. A list under `set`, `train` or `steps` is a grid: each value in turn."""

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
    pack: str = "1"
    search: Search | None = None

    @field_validator("pack", mode="before")
    @classmethod
    def _pack(cls, given: Any) -> str:
        packs.parse("pack", str(given))
        return str(given)

    @property
    def gathers(self) -> bool:
        """Whether it names methods or tasks by a word for several, of which some may not fit."""
        return "all" in self.methods or "all" in self.tasks or task_files.expand(self.tasks) != self.tasks

    def requests(self) -> list[Request]:
        """Every run: tasks, then models, then methods with their grids, then seeds. None twice."""
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
            }
        )
        tasks = task_files.expand(task_files.tasks() if "all" in self.tasks else self.tasks)
        found = [
            Request(method=m, task=t, model=model, seed=s, options=o, train=g, **common)
            for t in tasks
            for model in self.models
            for m in methods
            for o in grid(options[m])
            for g in grid(train)
            for s in self.seeds
        ]
        return [*{repr(r): r for r in found}.values()]

    def _options(self, methods: list[str]) -> dict[str, dict[str, Any]]:
        """Per method; `lora.r: 4`, or `lora: {r: 4}`, is for one of them, after what is for all."""
        own = {f"{k}.{o}": v for k, vs in self.set.items() if isinstance(vs, dict) for o, v in vs.items()}
        rest = {k: v for k, v in self.set.items() if not isinstance(v, dict)}
        found = {m: {k: v for k, v in rest.items() if "." not in k} for m in methods}
        for key, value in ({k: v for k, v in rest.items() if "." in k} | own).items():
            method, _, option = key.rpartition(".")
            if method not in found:
                raise unknown(f'method in set "{key}"', method, found)
            found[method][option] = value
        return found

    def _train(self) -> dict[str, Any]:
        for key in self.train:
            if key not in TRAIN:
                raise UserError(f'unknown key "train.{key}": {nearest(key, TRAIN) or _known(TRAIN)}')
        if self.steps is None:
            return self.train
        if twice := {"steps", "epochs"} & self.train.keys():
            raise UserError(f"steps and train.{min(twice)} say the same: keep one of them")
        return self.train | {"steps": self.steps}

    def searchable(self) -> None:
        """Raise `UserError` where a search does not go with the rest, or its space names no setting."""
        grids = [f"set.{k}" for k, v in self.set.items() if _is_grid(v)]
        grids += [f"train.{k}" for k, v in (self.train | {"steps": self.steps}).items() if _is_grid(v)]
        if grids:
            raise UserError(f"{grids[0]} is a list and there is a search: put its values into search.space")
        methods = registry.methods() if "all" in self.methods else self.methods
        for key, span in self.search.space.items():
            option, dot, name = key.partition(".")
            if not (dot and option == "set" and name) and key not in SEARCHED:
                known = {*SEARCHED, "set.OPTION"}
                raise UserError(f'unknown key "search.space.{key}": {nearest(key, known) or _known(known)}')
            if (method := name.rpartition(".")[0]) and method not in methods:
                raise unknown(f'method in search.space "{key}"', method, methods)
            if isinstance(span, Range) and span.log and span.low <= 0:
                raise UserError(f"search.space.{key}: low {span.low} on a log scale: above 0")


def _is_grid(value: Any) -> bool:
    return any(map(_is_grid, value.values())) if isinstance(value, dict) else isinstance(value, list)


def grid(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values; a list is several of them, anything else is one."""
    choices = [v if isinstance(v, list) else [v] for v in settings.values()]
    return [dict(zip(settings, values, strict=True)) for values in itertools.product(*choices)]


def read(path: Path) -> Sweep:
    """Load and check a sweep file. Raises `UserError` with file, key and what is allowed."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f'sweep file "{path}": {error.strerror}') from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f'sweep file "{path.name}": not plain YAML ({" ".join(str(error).split())})'
        ) from None
    if not isinstance(raw, dict):
        raise UserError(f'sweep file "{path.name}": needs keys: {_known(Sweep.model_fields)}')
    try:
        made = Sweep.model_validate(raw)
        if made.search:
            made.searchable()
        made.requests()
        return made
    except ValidationError as error:
        raise UserError(f'sweep file "{path.name}": {_first(error)}') from None
    except UserError as error:
        raise UserError(f'sweep file "{path.name}": {error}') from None


def _known(names: Iterable[str]) -> str:
    return "allowed: " + ", ".join(sorted(names))


def _first(error: ValidationError) -> str:
    """The first mistake, as key, value and what is allowed."""
    e = error.errors()[0]
    place = [str(p) for p in e["loc"] if str(p) not in ("Span", "int", "float") and "[" not in str(p)]
    key = ".".join(place) or "file"
    if e["type"] == "extra_forbidden":
        owner = {1: Sweep, 2: Search}.get(len(place), Range)
        return f'unknown key "{key}": {nearest(place[-1], owner.model_fields) or _known(owner.model_fields)}'
    given = f" (given: {e['input']!r})" if e["type"] != "missing" and not isinstance(e["input"], dict) else ""
    return f"{key}: {e['msg'].removeprefix('Value error, ')}{given}"
