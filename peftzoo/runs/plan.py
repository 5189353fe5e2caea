"""Requests and plans: a request is what the user names, a plan what it resolves to."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from peftzoo import models
from peftzoo.adapters import attach, configure
from peftzoo.contract import Adapter, registry
from peftzoo.errors import NeedsWeights, UserError, unknown
from peftzoo.measuring import counters
from peftzoo.models.pruning import Pruning
from peftzoo.records import published, store
from peftzoo.scoring import library_metrics, metrics, retention
from peftzoo.tasks import run_data, sources, splits, task_files
from peftzoo.tasks.schema import HeadSpec, Task
from peftzoo.training import config, selection
from peftzoo.training.config import TrainConfig


@dataclass(frozen=True)
class Request:
    """What to run. Fields that are None are filled from the recommendations of the task and the method."""

    method: str
    task: str
    model: str = "embedded"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    """Overrides of `TrainConfig` fields; `epochs` may stand for `steps`."""
    protocol: str | None = None
    """One of the task's protocols; None is its default."""
    preset: str | None = None
    """A published setting of the method; `options` and `train` override it."""
    precision: str = "auto"
    source: str | None = None
    data: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    eval_batch: int = 32
    prune: str | None = None
    """How to prune the base model before the method is attached, for example `wanda:0.5`."""
    retention: str | None = None
    """A task; the loss on its text is measured before and after training, to show what the run forgets."""
    trust_remote_code: bool = False
    trust_task_code: bool = False
    """Allow metrics of the library `evaluate`, which are code of the Hub."""
    save_every: int = 50
    """Steps between checkpoints; an interrupted run loses at most as many."""
    hold_out: tuple[int, int] | None = None
    """(rows, seed): score on so many training rows of each task, drawn with the seed; train on the others."""
    loss_only: bool = False
    """A trial: measure the loss on the held-out rows before and after training; score and save nothing."""
    start_loss: float | None = None
    """Of a trial, the loss before training, where another trial has measured it (it is measured if None)."""
    tuning: dict[str, Any] | None = None
    """The hyperparameter search that chose the options, for the record; its `budget` is part of the id."""
    validation: int | None = None
    """Rows of each task that are kept out of training; the loss on them is measured before and after it."""
    early_stop: int | None = None
    """Stop after so many checks without a lower loss on these rows, and report the state with the lowest.

    Without `validation` so many rows are held out as `splits.VALIDATION_ROWS` says.
    """


class LookupCache:
    """Tasks, rows and model facts that several requests of one command share, each looked up once."""

    def __init__(self) -> None:
        self._values: dict[tuple[Any, ...], Any] = {}

    def get(self, key: tuple[Any, ...], look_up: Callable[[], Any]) -> Any:
        """The value of `key`; the first call computes it with `look_up()`."""
        if key not in self._values:
            self._values[key] = look_up()
        return self._values[key]


class Plan:
    """A resolved request: method class, checked options, task, rows, protocol and training settings.

    Nothing is loaded but the rows. `cache` holds the look-ups of other requests of the same command. Raises
    `UserError` for a request that cannot be run.
    """

    def __init__(self, request: Request, cache: LookupCache | None = None) -> None:
        self._cached = (cache or LookupCache()).get
        self.cls = registry.get(request.method)
        self.request = request = replace(request, method=self.cls.name)
        self.task_group = self._cached(("task", request.task), lambda: task_files.task_group(request.task))
        self.preset = published.get(self.cls, request.preset) if request.preset else published.NONE
        self.adapter = configure(self.cls, self._options())
        _check_positive(request)
        self.pruning = Pruning.parse(request.prune) if request.prune else None
        self.view = self._view()
        self.higher_is_better = self._direction()
        self.protocol, self.selection = self.task_group.select_protocol(request.protocol)
        self._check_validation()
        self.data = self._data()
        self.settings = self.task_group.settings(self.source == "embedded")
        self.max_new_tokens = request.max_new_tokens or self.settings.max_new_tokens
        self.train_config = self._train_config()

    def _options(self) -> dict[str, Any]:
        """Options of the method: those of the task, overridden by the preset, overridden by the request."""
        from_task = {"description": self.task_group.instruction} if self.cls.described else {}
        return from_task | self.preset.options_for(self.task_group.name) | self.request.options

    def _data(self) -> run_data.RunData:
        """Load and split the rows; sets `source`, and `retention_set`, the rows of the retention task."""
        r, group = self.request, self.task_group
        mirror = sources.mirror_folder(r.data)
        self.source = source = sources.select_source(r.source, r.model, mirror, named=r.data is not None)
        needs_train_rows = self.cls.trains or self.cls.searches or self.pruning is not None
        data = self._cached(("rows", r.task, source, mirror, needs_train_rows),
                          lambda: run_data.load(group, source, mirror, needs_train_rows))  # fmt: skip
        if r.validation or r.early_stop:  # every method and seed holds out the same rows
            data = self._cached(("validation", r.task, source, mirror, r.validation),
                              lambda: splits.with_validation(data, r.validation))  # fmt: skip
        self.retention_set = r.retention and self._cached(
            ("retention", r.retention, r.task, source, mirror),
            lambda: retention.load(r.retention, group, source, mirror),
        )
        if r.loss_only:  # the trials of a search hold out the same rows
            return self._cached(("trial", r.task, source, mirror, r.hold_out),
                              lambda: _trial_rows(data, r.hold_out))  # fmt: skip
        return splits.split(data, hold_out=r.hold_out, selection=self.selection, seed=r.seed, limit=r.limit)

    @property
    def model(self) -> models.Named:
        """The model's name and source, for the record. Raises `UserError` for a shape without weights."""
        return self._cached(("model", self.request.model), lambda: models.named(self.request.model))

    def new_adapter(self) -> Adapter:
        """A new adapter with the plan's options, not yet attached."""
        return self.cls(self.adapter.config)

    @property
    def eval_sets(self) -> list[run_data.EvalSet]:
        """The scored tasks with their rows."""
        return self.data.eval_sets

    @property
    def head(self) -> HeadSpec | None:
        """The classification or regression head that all scored tasks share; None without one."""
        return self.task_group.tasks[0].extra.head if self.view == "head" else None

    def _view(self) -> str:
        """How the model is scored: `generate`, `choice` or `head`, the same for all tasks of the group.

        Raises `UserError` where tasks differ in it, or the method or an option does not go with a head.
        """
        name, tasks = self.request.model, self.task_group.tasks
        causal = self._cached(("causal", name), lambda: models.is_causal(name))
        views = {t.view(causal): t for t in tasks}
        heads = {t.extra.head and (t.extra.head.kind, t.extra.head.labels): t for t in tasks}
        if len(views) > 1 or ("head" in views and len(heads) > 1):
            first, second = [*(views if len(views) > 1 else heads).values()][:2]
            raise UserError(
                f'"{self.task_group.name}" cannot be trained together: "{first.name}" and "{second.name}" '
                "are scored in different ways; run them one by one"
            )
        (view,) = views
        if view == "head" and self.cls.searches:
            raise UserError(
                f'method "{self.request.method}" fits itself without gradients, task "{tasks[0].name}" needs '
                "a trained head: choose a task that is generated or chosen"
            )
        if view == "head" and self.request.retention:
            raise UserError("--retention measures the loss on text: a causal model and a task without a head")
        for task in tasks:
            self._check_metrics(task, view)
        return view

    def _direction(self) -> bool:
        """Whether a higher score is better. Raises `UserError` where the tasks of the group differ in it."""
        directions = {t.higher_is_better: t for t in self.task_group.tasks}
        if len(directions) > 1:
            up, down = directions[True], directions[False]
            raise UserError(
                f'"{self.task_group.name}" cannot be trained together: higher is better for the '
                f'{up.extra.metric} of "{up.name}", lower for the {down.extra.metric} of "{down.name}", so '
                "their mean says nothing; run them one by one"
            )
        return next(iter(directions))

    def _check_metrics(self, task: Task, view: str) -> None:
        """Raise `UserError` for a metric that does not exist, or is somebody's code that is not trusted."""
        library_metrics.check_trusted(task, self.request.trust_task_code)
        library = library_metrics.names(task)
        known = [*metrics.METRICS, *library] if view == "head" else task.metrics()
        for name in (task.extra.metric, *task.extra.also):
            if known and name not in known and not (library and view != "head"):  # these may have any results
                raise unknown(f'metric of task "{task.name}"', name, known)

    def _check_validation(self) -> None:
        """Raise `UserError` where this run can hold no rows out, or its protocol chooses a checkpoint."""
        r = self.request
        if r.validation is None and r.early_stop is None:
            return
        option = f"--early-stop {r.early_stop}" if r.validation is None else f"--hold-out {r.validation}"
        if r.validation is not None and r.validation < 1:
            raise UserError(f"{option}: at least 1")
        if r.early_stop is not None and not 1 <= r.early_stop <= selection.CHECKS:
            raise UserError(f"--early-stop {r.early_stop}: from 1 to {selection.CHECKS}, the checks of a run")
        if not self.cls.trains or self.cls.searches:
            how = "fits itself without gradients" if self.cls.searches else "does not train"
            raise UserError(f'method "{r.method}" {how}: leave {option} out, or take another --method')
        if self.selection:
            raise UserError(
                f"{option} and --protocol {self.protocol}: the protocol chooses the reported state by "
                "scores; keep one of them"
            )
        if r.hold_out:
            raise UserError(f"{option}: a trial of a search holds rows of its own out; leave {option} out")

    @property
    def validation_rows(self) -> int | None:
        """Rows of each task that are kept out of training; None without any."""
        rows = self.data.info.get("validation", {}).get("rows")
        return rows and rows[0]

    def _train_config(self) -> TrainConfig:
        """Settings of the task and the method, overridden by the preset, overridden by the request.

        `epochs` is converted to steps. Raises `UserError` for a value out of range.
        """
        s, r = self.settings, self.request
        precision = config.precision_of(r.precision)
        fields = {
            "steps": s.steps if self.cls.trains else 0,
            "batch_size": s.batch_size,
            "max_length": s.max_length,
        }
        fields |= {"train_on_prompt": s.train_on_prompt, "precision": precision}
        fields |= {"lr": self.cls.lr * s.lr_scale}
        overrides = {k: v for k, v in r.train.items() if v is not None}
        fields |= self.preset.train_fields_for(self.task_group.name, overrides)
        epochs = fields.pop("epochs", None)
        if not self.cls.trains:
            fields["steps"], epochs = 0, None
        checked = config.checked(fields)
        if epochs is None:
            return checked
        config.check_epochs(epochs)
        steps = max(1, round(epochs * self.data.trained_rows / checked.batch_size))
        return checked.model_copy(update={"steps": steps})

    def attach_to_shapes(self) -> None:
        """Attach the method to the model on the meta device, to find options that do not fit before any run.

        Raises the `UserError` of such options. Any other exception is left to the run, which records it.
        """
        try:
            attach(models.on_meta(self.request.model), self.new_adapter(), seed=self.request.seed)
        except NeedsWeights:
            pass
        except UserError:
            raise
        except Exception:  # a plugin's code
            pass

    def identity(self) -> str:
        """The id of this configuration: a hash of everything that decides the result, except the seed."""
        optional = {"prune": self.request.prune, "retention": self.request.retention}
        optional["tuning"] = (self.request.tuning or {}).get("budget")
        optional["task_digest"] = task_files.digest_for_id(self.request.task, self.task_group)
        optional["early_stop"] = self.request.early_stop  # rows that are held out are part of data.info
        if retained := self.retention_set:
            optional["retention_digest"] = task_files.digest_for_id(self.request.retention, retained.task)
        extra = {k: v for k, v in optional.items() if v}
        return store.identity(extra | {
            "measure": counters.MEASURE_VERSION, "method": self.request.method,
            "config": self.adapter.config.model_dump(mode="json"),
            "train": self.train_config.model_dump(mode="json"),
            "task": self.task_group.name, "version": self.task_group.version, "protocol": self.protocol,
            "view": self.view, "model": self.model.source, "data": self.data.info,
            "rows": self.data.scored_rows,
            "max_new_tokens": self.max_new_tokens if self.view == "generate" else None,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        })  # fmt: skip

    def command(self) -> str:
        """The command line that repeats this run with all its settings; `FOLDER` stands for local paths."""
        r = self.request
        task = Path(r.task).name if task_files.is_file(r.task) else r.task
        arguments = ["peftzoo", "bench", "--method", r.method, "--task", task, "--model", r.model]
        if r.model not in {m["name"] for m in models.known()} and Path(r.model).expanduser().exists():
            arguments[-1] = "FOLDER"
        if not self.cls.__module__.startswith("peftzoo."):  # a plugin, from a file or a package
            file = Path(inspect.getfile(self.cls)).name
            arguments += ["--plugin", file] if self.cls.__module__.startswith("peftzoo_plugin_") else []
        arguments += ["--source", self.source, *(("--data", "FOLDER") if self.source == "mirror" else ())]
        arguments += ["--seeds", str(r.seed)]
        extra = {"limit": r.limit, "max_new_tokens": r.max_new_tokens, "prune": r.prune}
        extra |= {"protocol": self.protocol if self.selection else None, "retention": r.retention}
        extra |= {"hold_out": self.validation_rows, "early_stop": r.early_stop}
        extra["trust_task_code"] = r.trust_task_code
        for key, value in (self.train_config.model_dump() | extra).items():
            if value is not None and value is not False:
                arguments += [f"--{key.replace('_', '-')}"] + ([str(value)] if value is not True else [])
        for key, value in self.adapter.config.model_dump(mode="json", exclude_none=True).items():
            arguments += ["--set", f"{key}={_as_text(value)}"]
        trial = " # but scored on held-out training rows: a trial of a sweep's search" if r.hold_out else ""
        return shlex.join(arguments) + trial


def resolve(requests: list[Request], *, skip: bool,
            done: Callable[[Plan], bool] = lambda _: False) -> tuple[list[Plan], list[str]]:  # fmt: skip
    """Plans of the requests that can be run, and a message for each other one.

    Each plan is checked on the shapes of its model (`attach_to_shapes`), once for all its seeds; one that is
    `done` is not, which saves the import of the model's code. Raises the first `UserError`; with `skip`,
    requests that raise are left out, and it is raised only if none is left.
    """
    cache, refused, plans = LookupCache(), {}, []
    checked: set[str] = set()
    for request in requests:
        key = repr(replace(request, seed=0))
        if key in refused:
            continue
        try:
            plan = _plan(request, cache)
            if key not in checked and not done(plan):
                checked.add(key)
                plan.attach_to_shapes()
        except UserError as error:
            if not skip:
                raise
            refused[key] = error
            continue
        plans.append(plan)
    if not plans:
        raise next(iter(refused.values()), UserError("there is nothing to run"))
    return plans, [f"skipped: {e}" for e in dict.fromkeys(map(str, refused.values()))]


def _plan(request: Request, cache: LookupCache) -> Plan:
    """The plan of a request. Any exception, such as one of a plugin's code, is raised as `UserError`."""
    try:
        return Plan(request, cache)
    except UserError:
        raise
    except Exception as error:  # a plugin's code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f'method "{request.method}" breaks when it is planned ({reason})') from error


def _trial_rows(data: run_data.RunData, hold_out: tuple[int, int]) -> run_data.RunData:
    """The rows of a trial of which only the loss is measured, which its id says."""
    data = splits.split(data, hold_out=hold_out)
    data.info = data.info | {"held_out": data.info["held_out"] | {"measured": "loss"}}
    return data


def as_plan(request: Request | Plan) -> Plan:
    """The plan of a request; a plan is returned unchanged."""
    return request if isinstance(request, Plan) else Plan(request)


def _check_positive(request: Request) -> None:
    """Raise `UserError` for a limit or an interval below 1."""
    for name in ("limit", "max_new_tokens", "save_every"):
        if (value := getattr(request, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1")


def _as_text(value: Any) -> str:
    """An option's value as `--set` reads it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)
