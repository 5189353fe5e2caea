"""What is asked for and what it means: checked options, chosen rows, the id of the configuration."""

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
from peftzoo.scoring import metrics, retention
from peftzoo.tasks import run_data, sources, splits, task_files
from peftzoo.tasks.schema import HeadSpec, Protocol
from peftzoo.training.config import TrainConfig, auto_precision


@dataclass(frozen=True)
class Request:
    """What to run. Fields left at None are filled from the task's and the method's recommendations."""

    method: str
    task: str
    model: str = "embedded"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    """Overrides of `TrainConfig` fields; `epochs` may stand for `steps`."""
    protocol: str | None = None
    """One of those that the task offers; None: its own."""
    preset: str | None = None
    """A published setting of the method; `options` and `train` go before it."""
    precision: str = "auto"
    source: str | None = None
    data: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    eval_batch: int = 32
    prune: str | None = None
    """Prune the base model before the method is attached, for example `wanda:0.5`."""
    retention: str | None = None
    """A task whose text is read before and after: what the run forgets."""
    trust_remote_code: bool = False
    save_every: int = 50
    """Steps between checkpoints; an interrupted run loses no more."""
    hold_out: tuple[int, int] | None = None
    """(rows, seed): train on the other training rows, and score on these in place of the scored rows."""
    tuning: dict[str, Any] | None = None
    """The search that chose the options, for the record; its `budget` is a part of the identity."""


class Shared:
    """What several requests of one command have in common: each task, its rows and each model's facts are
    looked up once."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], Any] = {}

    def once(self, what: tuple[Any, ...], look_up: Callable[[], Any]) -> Any:
        if what not in self._found:
            self._found[what] = look_up()
        return self._found[what]


class Plan:
    """A request made definite: checked options, chosen source and rows, and the id that names it.

    Each part is resolved once, by its own room in one call: task and rows, model, method and options,
    protocol. `shared` holds what other requests of the same command have in common with this one.
    """

    def __init__(self, request: Request, shared: Shared | None = None) -> None:
        self._once = (shared or Shared()).once
        self.cls = registry.get(request.method)
        self.request = request = replace(request, method=self.cls.name)
        self.task_group = self._once(("task", request.task), lambda: task_files.task_group(request.task))
        self.preset = published.get(self.cls, request.preset) if request.preset else published.NONE
        self.adapter = configure(self.cls, self._options())
        _check_counts(request)
        self.pruning = Pruning.parse(request.prune) if request.prune else None
        self.view = self._view()
        self.protocol, self.selection = self._protocol()
        self.data = self._data()
        self.settings = self.task_group.settings(self.source == "embedded")
        self.max_new_tokens = request.max_new_tokens or self.settings.max_new_tokens
        self.train_config = self._train_config()

    def _options(self) -> dict[str, Any]:
        """Options of the method: what a task fills in, then the preset's, then those of the request."""
        filled_in = {"description": self.task_group.instruction} if self.cls.described else {}
        return filled_in | self.preset.chosen(self.task_group.name) | self.request.options

    def _data(self) -> run_data.RunData:
        """The rows, from the source that the request means; also of the task that shows what is forgotten."""
        r, group = self.request, self.task_group
        mirror = sources.mirror_folder(r.data)
        self.source = source = sources.select_source(r.source, r.model, mirror, named=r.data is not None)
        learns = self.cls.trains or self.cls.searches or self.pruning is not None
        found = self._once(("rows", r.task, source, mirror, learns),
                           lambda: run_data.load(group, source, mirror, learns))  # fmt: skip
        self.general = r.retention and self._once(
            ("retention", r.retention, r.task, source, mirror),
            lambda: retention.load(r.retention, group, source, mirror),
        )
        return splits.split(found, hold_out=r.hold_out, selection=self.selection, seed=r.seed, limit=r.limit)

    @property
    def model(self) -> models.Named:
        """The model's name and source, for the record. Raises `UserError` for a shape without weights."""
        return self._once(("model", self.request.model), lambda: models.named(self.request.model))

    def new_adapter(self) -> Adapter:
        """A fresh adapter with the plan's options, to be attached."""
        return self.cls(self.adapter.config)

    @property
    def eval_sets(self) -> list[run_data.EvalSet]:
        """The scored tasks."""
        return self.data.eval_sets

    @property
    def head(self) -> HeadSpec | None:
        """The trained head that all scored tasks share."""
        return self.task_group.tasks[0].extra.head if self.view == "head" else None

    def _view(self) -> str:
        """How the model is scored: the same in all tasks of the group."""
        name, tasks = self.request.model, self.task_group.tasks
        causal = self._once(("causal", name), lambda: models.is_causal(name))
        views = {t.view(causal): t for t in tasks}
        heads = {t.extra.head and (t.extra.head.kind, t.extra.head.labels): t for t in tasks}
        if len(views) > 1 or ("head" in views and len(heads) > 1):
            one, two = [*(views if len(views) > 1 else heads).values()][:2]
            raise UserError(
                f'"{self.task_group.name}" cannot be trained together: "{one.name}" and "{two.name}" are '
                "scored in different ways; run them one by one"
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
            known = metrics.METRICS if view == "head" else task.metrics()
            for name in (task.extra.metric, *task.extra.also):
                if known and name not in known:
                    raise unknown(f'metric of task "{task.name}"', name, known)
        return view

    def _protocol(self) -> tuple[str, Protocol | None]:
        about, asked = self.task_group.about, self.request.protocol
        if asked in (None, about.protocol):
            return about.protocol, None
        if asked not in about.protocols:
            raise unknown(
                f'protocol of task "{self.task_group.name}"', asked, [about.protocol, *about.protocols]
            )
        return asked, about.protocols[asked]

    def _train_config(self) -> TrainConfig:
        s, r = self.settings, self.request
        precision = auto_precision() if r.precision == "auto" else r.precision
        fields = {
            "steps": s.steps if self.cls.trains else 0,
            "batch_size": s.batch_size,
            "max_length": s.max_length,
        }
        fields |= {"train_on_prompt": s.train_on_prompt, "precision": precision}
        fields |= {"lr": self.cls.lr * s.lr_scale}
        given = {k: v for k, v in r.train.items() if v is not None}
        fields |= self.preset.training(self.task_group.name, given)
        epochs = fields.pop("epochs", None)
        if not self.cls.trains:
            fields["steps"], epochs = 0, None
        try:
            config = TrainConfig(**fields)
        except ValueError as error:
            first = error.errors()[0]
            raise UserError(
                f"--{'.'.join(map(str, first['loc'])).replace('_', '-')} {first['input']}: {first['msg']}"
            ) from None
        if epochs is None:
            return config
        if not isinstance(epochs, (int, float)) or not 0 < epochs <= 1e6:
            raise UserError(f"--epochs {epochs}: a number above 0, at most 1,000,000")
        steps = max(1, round(epochs * self.data.trained_rows / config.batch_size))
        return config.model_copy(update={"steps": steps})

    def attach_to_shapes(self) -> None:
        """Attach the method to the model's bare shapes: raises the `UserError` of options that do not fit it.

        A method that breaks in any other way is not judged here: its run tells why, on record.
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
        """The name of this configuration: everything that decides the result, but not the seed."""
        asked = {"prune": self.request.prune, "retention": self.request.retention}
        asked["tuning"] = (self.request.tuning or {}).get("budget")
        extra = {k: v for k, v in asked.items() if v}
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
        """The command that repeats this run whatever the defaults become; without paths of this machine."""
        r = self.request
        task = Path(r.task).name if task_files.is_file(r.task) else r.task
        words = ["peftzoo", "bench", "--method", r.method, "--task", task, "--model", r.model]
        if r.model not in {m["name"] for m in models.known()} and Path(r.model).expanduser().exists():
            words[-1] = "FOLDER"
        if not self.cls.__module__.startswith("peftzoo."):  # a plugin, from a file or a package
            file = Path(inspect.getfile(self.cls)).name
            words += ["--plugin", file] if self.cls.__module__.startswith("peftzoo_plugin_") else []
        words += ["--source", self.source, *(("--data", "FOLDER") if self.source == "mirror" else ())]
        words += ["--seeds", str(r.seed)]
        extra = {"limit": r.limit, "max_new_tokens": r.max_new_tokens, "prune": r.prune}
        extra |= {"protocol": self.protocol if self.selection else None, "retention": r.retention}
        for key, value in (self.train_config.model_dump() | extra).items():
            if value is not None and value is not False:
                words += [f"--{key.replace('_', '-')}"] + ([str(value)] if value is not True else [])
        for key, value in self.adapter.config.model_dump(mode="json", exclude_none=True).items():
            words += ["--set", f"{key}={_as_text(value)}"]
        trial = " # but scored on held-out training rows: a trial of a sweep's search" if r.hold_out else ""
        return shlex.join(words) + trial


def resolve(requests: list[Request], *, skip: bool) -> tuple[list[Plan], list[str]]:
    """Plans of the requests that can be run, after each was tried on its model's shapes, and notes on the
    others.

    Raises the first `UserError`; with `skip` only where nothing is left. Seeds are tried once for all. A
    method that breaks when it is attached is left in: its run tells why, on record, and stops no other.
    """
    shared, refused, plans = Shared(), {}, []
    tried: set[str] = set()
    for request in requests:
        key = repr(replace(request, seed=0))
        if key in refused:
            continue
        try:
            plan = _plan(request, shared)
            if key not in tried:
                tried.add(key)
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


def _plan(request: Request, shared: Shared) -> Plan:
    try:
        return Plan(request, shared)
    except UserError:
        raise
    except Exception as error:  # a plugin's code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f'method "{request.method}" breaks when it is planned ({reason})') from error


def resolved(request: Request | Plan) -> Plan:
    """The plan of a request; a plan is what it is."""
    return request if isinstance(request, Plan) else Plan(request)


def _check_counts(request: Request) -> None:
    for name in ("limit", "max_new_tokens", "save_every"):
        if (value := getattr(request, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1")


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)
