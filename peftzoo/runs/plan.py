"""What is asked for and what it means: checked options, chosen rows, the id of the configuration."""

from __future__ import annotations

import inspect
import json
import shlex
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from peftzoo import models
from peftzoo.adapters import attach, configure
from peftzoo.contract import registry
from peftzoo.errors import NeedsWeights, UserError, unknown
from peftzoo.measuring import counters
from peftzoo.models.pruning import Pruning
from peftzoo.records import published, store
from peftzoo.scoring import metrics, retention
from peftzoo.tasks import run_data, sources, task_files
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


class Plan:
    """A request made definite: checked options, chosen source and rows, and the id that names it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.course = task_files.course(request.task)
        self.cls = registry.get(request.method)
        self.request = request = replace(request, method=self.cls.name)
        self.preset = published.get(self.cls, request.preset) if request.preset else published.NONE
        told = {"description": self.course.words} if self.cls.described else {}
        self.adapter = configure(self.cls, told | self.preset.chosen(self.course.name) | request.options)
        for name, value in (("limit", request.limit), ("max_new_tokens", request.max_new_tokens),
                            ("save_every", request.save_every)):  # fmt: skip
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least 1")
        self.pruning = Pruning.parse(request.prune) if request.prune else None
        self.view = self._view()
        self.protocol, self.choice = self._protocol()
        mirror = sources.mirror_folder(request.data)
        self.source = sources.choose(request.source, request.model, mirror, named=request.data is not None)
        learns = self.cls.trains or self.cls.searches or self.pruning is not None
        self.material = run_data.load(self.course, self.source, mirror, learns)
        if request.hold_out:
            run_data.hold_out(self.material, *request.hold_out)
        if self.choice:
            run_data.choose_by(self.parts, self.choice, request.seed)
        if request.limit:
            run_data.limit(self.parts, request.limit)
        self.general = None
        if request.retention:
            self.general = retention.load(request.retention, self.course, self.source, mirror)
        self.settings = self.course.settings(self.source == "embedded")
        self.max_new_tokens = request.max_new_tokens or self.settings.max_new_tokens
        self.config = self._train_config()

    @property
    def parts(self) -> list[run_data.Part]:
        """The scored tasks."""
        return self.material.parts

    @property
    def head(self) -> HeadSpec | None:
        """The trained head that all scored tasks share."""
        return self.course.tasks[0].extra.head if self.view == "head" else None

    def _view(self) -> str:
        """How the model is scored: the same in all tasks of the course."""
        causal, tasks = models.is_causal(self.request.model), self.course.tasks
        views = {t.view(causal): t for t in tasks}
        heads = {t.extra.head and (t.extra.head.kind, t.extra.head.labels): t for t in tasks}
        if len(views) > 1 or ("head" in views and len(heads) > 1):
            one, two = [*(views if len(views) > 1 else heads).values()][:2]
            raise UserError(
                f'"{self.course.name}" cannot be trained together: "{one.name}" and "{two.name}" are scored '
                "in different ways; run them one by one"
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
        about, asked = self.course.about, self.request.protocol
        if asked in (None, about.protocol):
            return about.protocol, None
        if asked not in about.protocols:
            raise unknown(f'protocol of task "{self.course.name}"', asked, [about.protocol, *about.protocols])
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
        fields |= self.preset.training(self.course.name, given)
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
        steps = max(1, round(epochs * self.material.trained_rows / config.batch_size))
        return config.model_copy(update={"steps": steps})

    def try_on(self) -> None:
        """Attach the method to the model's bare shapes: shows at once whether its options fit this model."""
        with suppress(NeedsWeights):
            attach(models.on_meta(self.request.model), self.adapter, seed=self.request.seed)

    def identity(self, model_source: dict[str, Any]) -> str:
        """The name of this configuration: everything that decides the result, but not the seed."""
        asked = {"prune": self.request.prune, "retention": self.request.retention}
        asked["tuning"] = (self.request.tuning or {}).get("budget")
        extra = {k: v for k, v in asked.items() if v}
        return store.identity(extra | {
            "measure": counters.MEASURE_VERSION, "method": self.request.method,
            "config": self.adapter.config.model_dump(mode="json"),
            "train": self.config.model_dump(mode="json"),
            "task": self.course.name, "version": self.course.version, "protocol": self.protocol,
            "view": self.view, "model": model_source, "data": self.material.info,
            "rows": self.material.scored_rows,
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
        extra |= {"protocol": self.protocol if self.choice else None, "retention": r.retention}
        for key, value in (self.config.model_dump() | extra).items():
            if value is not None and value is not False:
                words += [f"--{key.replace('_', '-')}"] + ([str(value)] if value is not True else [])
        for key, value in self.adapter.config.model_dump(mode="json", exclude_none=True).items():
            words += ["--set", f"{key}={_as_text(value)}"]
        trial = " # but scored on held-out training rows: a trial of a sweep's search" if r.hold_out else ""
        return shlex.join(words) + trial


def check(requests: list[Request], *, skip: bool) -> tuple[list[Request], list[str]]:
    """The requests that can be run, after each was tried on its model's shapes, and notes on the others.

    Raises the first `UserError`; with `skip` only where nothing is left. Seeds are tried once for all. A
    method that breaks in any other way is left in: its run tells why, on record, and stops no other.
    """
    unfit: dict[str, UserError] = {}
    tried = {repr(replace(r, seed=0)): r for r in requests}
    for key, request in tried.items():
        try:
            Plan(request).try_on()
        except UserError as error:
            if not skip:
                raise
            unfit[key] = error
        except Exception:  # a plugin's code: see above
            continue
    fit = [r for r in requests if repr(replace(r, seed=0)) not in unfit]
    if not fit:
        raise next(iter(unfit.values()), UserError("there is nothing to run"))
    return fit, [f"skipped: {e}" for e in dict.fromkeys(map(str, unfit.values()))]


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)
