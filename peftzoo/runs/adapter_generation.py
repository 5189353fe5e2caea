"""Methods that write their weights from a description: train one on several tasks, measure what it saves.

A description is what a plain model would carry in front of every prompt: the task in words and a few worked
examples. The method reads it once, its weights are merged, and the model runs on the bare prompt. Every task
is scored as a causal model answers it, by generation or by choices.
"""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftzoo import models
from peftzoo.adapters import Attached, attach, configure, saving, write_atomically
from peftzoo.contract import Adapter, registry
from peftzoo.errors import UserError
from peftzoo.measuring import counters
from peftzoo.scoring import evaluation
from peftzoo.tasks import run_data, sources, task_files
from peftzoo.training import batches
from peftzoo.training.config import TrainConfig, auto_precision
from peftzoo.training.loop import Loop, NonFinite, TrainingStats

Progress = Callable[[str, int, int], None]
"""progress(what, done, total)"""


@dataclass(frozen=True)
class Request:
    """What to do. Fields of `train` that are not given come from the tasks and the method."""

    method: str
    tasks: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    """Tasks whose descriptions are read only after training."""
    model: str = "embedded"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    shots: int = 2
    limit: int | None = None
    precision: str = "auto"
    source: str | None = None
    data: str | None = None
    eval_batch: int = 32


class Subject:
    """A task with its description, and its prompts with the description in front and without."""

    def __init__(self, name: str, request: Request, tokenizer: Any) -> None:
        task, mirror = task_files.get(name), sources.mirror_folder(request.data)
        source = sources.select_source(request.source, request.model, mirror, named=request.data is not None)
        self.task, self.seen, self.tokenizer = task, name in request.tasks, tokenizer
        self.rows = sources.load(task, source, mirror)
        if request.limit:
            self.rows.test = self.rows.test.select(range(min(request.limit, len(self.rows.test))))
        self.settings = task.extra.embedded.settings if source == "embedded" else task.extra.settings
        self.metric = task.extra.metric if task.extra.metric in task.metrics() else task.metrics()[0]
        self.bare = self._prompts("")
        shots = ["".join(self._example(self.rows.train[i])) for i in range(request.shots)]
        self.description = "\n\n".join([task.instruction.strip(), *shots])
        self.told = self._prompts("{% raw %}" + self.description + "\n\n{% endraw %}")

    def _prompts(self, front: str) -> Any:
        task = self.task.model_copy(update={"description": front, "num_fewshot": 0})
        return evaluation.harness_task(task, self.rows, self.settings.max_new_tokens)

    def _example(self, row: dict[str, Any]) -> tuple[str, str]:
        return evaluation.prompt_and_answer(self.bare, row)

    def example(self, i: int) -> batches.Example:
        """Training row i, without the description."""
        prompt, answer = self._example(self.rows.train[i])
        return batches.language_example(self.tokenizer, prompt, answer, self.settings.max_length)

    @cached_property
    def lengths(self) -> dict[str, float]:
        """Mean tokens of the scored prompts, with and without the description."""
        prompts = {"told": self.told, "bare": self.bare}
        return {
            k: statistics.fmean(len(self._ids(p, row)) for row in self.rows.test) for k, p in prompts.items()
        }

    def _ids(self, prompts: Any, row: dict[str, Any]) -> list[int]:
        return self.tokenizer(prompts.fewshot_context(row, 0))["input_ids"]

    def first(self, prompts: Any, device: torch.device) -> torch.Tensor:
        """Token ids of the first scored prompt, (1, T)."""
        return torch.tensor([self._ids(prompts, self.rows.test[0])], device=device)


def prepare(request: Request) -> tuple[models.Loaded, Adapter, list[Subject]]:
    """The model, the configured method and the tasks. Raises `UserError` for what does not go together."""
    cls = registry.get(request.method)
    if not cls.described:
        others = [name for name in registry.methods() if registry.get(name).described]
        raise UserError(f'method "{cls.name}" reads no description; these do: {", ".join(others)}')
    if not models.is_causal(request.model):
        raise UserError(f'model "{request.model}" is an encoder: name a causal one (--model embedded)')
    if both := sorted({*request.tasks} & {*request.unseen}):
        raise UserError(f'task "{both[0]}" is trained on, so it is not unseen: name it once')
    attach(models.on_meta(request.model), configure(cls, request.options))  # shows at once whether they fit
    loaded = models.load(request.model)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    subjects = [Subject(n, request, loaded.tokenizer) for n in (*request.tasks, *request.unseen)]
    return loaded, configure(cls, request.options), subjects


def overlaps(subjects: list[Subject]) -> dict[str, Any]:
    """Scored rows of any task that are training rows of a seen one, where their task allows for it."""
    parts = [run_data.EvalSet(s.task, s.rows) for s in subjects]
    return run_data.overlaps(parts, [run_data.TrainSet(s.task, s.rows.train) for s in subjects if s.seen])


def train_config(request: Request, subjects: list[Subject]) -> TrainConfig:
    """What the tasks recommend: all their steps, and the largest of their other settings."""
    s = [subject.settings for subject in subjects if subject.seen]
    fields = {
        "steps": sum(x.steps for x in s), "batch_size": max(x.batch_size for x in s),
        "max_length": max(x.max_length for x in s),
        "lr": registry.get(request.method).lr * max(x.lr_scale for x in s),
        "precision": auto_precision() if request.precision == "auto" else request.precision,
    }  # fmt: skip
    try:
        return TrainConfig(**fields | {k: v for k, v in request.train.items() if v is not None})
    except ValueError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{name} {first['input']}: {first['msg']}") from None


def train(
    attached: Attached, subjects: list[Subject], config: TrainConfig, seed: int, on_progress: Progress
) -> TrainingStats:
    """Train on all seen tasks in turn, each batch of one task and under its description."""
    from accelerate import Accelerator

    seen = [s for s in subjects if s.seen]
    rows, plans = [], []
    for number, s in enumerate(seen):
        start, count = len(rows), len(s.rows.train)
        steps = -(-config.steps // len(seen))
        plan = batches.plan([0] * count, steps, config.batch_size, seed + number)
        plans.append([[start + i for i in batch] for batch in plan])
        rows += [(s, i) for i in range(count)]
    loop = Loop(
        attached, batches.LazyExamples(rows, lambda row: row[0].example(row[1])), config,
        pad=seen[0].tokenizer.pad_token_id, seed=seed,
        accelerator=Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no"),
        on_step=lambda step, total, *_: on_progress("training", step, total),
        order=[plans[step % len(seen)][step // len(seen)] for step in range(config.steps)],
        before=lambda batch: attached.adapter.describe(rows[batch[0]][0].description),
    )  # fmt: skip
    try:
        return loop.run()
    except NonFinite as error:
        raise UserError(f"training broke down, {error}: lower --lr (now {config.lr:g})") from None


def score(loaded: models.Loaded, subject: Subject, prompts: Any, size: int, precision: str) -> dict[str, Any]:
    """Score on the task's rows, and milliseconds per row in batches of `size`."""
    found = evaluation.score_language(
        loaded.model, loaded.tokenizer, prompts, size, precision, subject.metric
    )
    return {
        "value": found.metrics[subject.metric], "stderr": found.stderr.get(subject.metric),
        "row_ms": round(found.seconds / found.rows * 1e3, 3),
    }  # fmt: skip


def run(request: Request, out: Path, on_progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Train, save the generator in `out`, and report per task what the description costs and gives.

    `bare`: the base on the prompt alone; `told`: the base with the description in front of it; `written`: the
    merged model on the prompt alone. Times to the first token are of the merged model on one prompt, with the
    description and without, one after the other: it has the base's shapes, so the prompt alone differs.
    """
    loaded, adapter, subjects = prepare(request)
    config, device = train_config(request, subjects), loaded.model.device
    overlap = overlaps(subjects)
    tasks = {
        s: {"task": s.task.name, "seen": s.seen, "metric": s.metric, "rows": len(s.rows.test)}
        for s in subjects
    }
    options = request.eval_batch, config.precision
    for number, s in enumerate(subjects):
        on_progress("scoring the base", number, len(subjects))
        tasks[s] |= {"bare": score(loaded, s, s.bare, *options), "told": score(loaded, s, s.told, *options)}
    attached = attach(loaded.model, adapter, seed=request.seed, tokenizer=loaded.tokenizer)
    done = train(attached, subjects, config, request.seed, on_progress)
    adapter.describe("")  # a generator on its own stands for no task
    method_config = adapter.config.model_dump(mode="json")
    saving.save(
        attached, out / "generator", model=loaded.name, tasks=[s.task.name for s in subjects if s.seen]
    )
    for number, s in enumerate(subjects):
        on_progress("writing and scoring", number, len(subjects))
        begin = time.perf_counter()
        adapter.describe(s.description)
        with attached.merged():
            tasks[s]["written_ms"] = round((time.perf_counter() - begin) * 1e3, 3)
            tasks[s]["written"] = score(loaded, s, s.bare, *options)
            tasks[s] |= saved(loaded.model, s, device, config.precision)
    report = {
        "command": command(request), "method": adapter.name, "method_config": method_config,
        "model": loaded.name, "model_source": loaded.source, "seed": request.seed, "shots": request.shots,
        "train_config": config.model_dump(mode="json"), "trainable_params": attached.trainable_count(),
        "train_seconds": round(done.seconds, 3), "losses": [round(x, 6) for x in done.losses],
        "environment": counters.environment(), "tasks": list(tasks.values()), **overlap,
    }  # fmt: skip
    write_atomically(out / "gain.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def saved(model: nn.Module, s: Subject, device: torch.device, precision: str) -> dict[str, Any]:
    """Tokens of context and milliseconds to the first token, with the description and without."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        told, bare = (
            counters.generation_latency(model, s.first(p, device), new_tokens=2, rounds=9)["first_token_ms"]
            for p in (s.told, s.bare)
        )
    return {"prompt_tokens": s.lengths, "first_token_ms": {"told": told, "bare": bare}}


def command(request: Request) -> str:
    """The command that does this again; without paths of this machine."""
    r = request
    folder = r.model not in {m["name"] for m in models.known()} and Path(r.model).expanduser().exists()
    words = ["peftzoo", "generate", "--method", r.method, "--tasks", ",".join(r.tasks)]
    words += ["--unseen", ",".join(r.unseen)] if r.unseen else []
    words += ["--model", "FOLDER" if folder else r.model, "--shots", str(r.shots), "--seed", str(r.seed)]
    words += ["--source", r.source] if r.source else []
    words += ["--data", "FOLDER"] if r.data else []
    for key, value in ({"limit": r.limit, "precision": r.precision} | r.train).items():
        words += [f"--{key.replace('_', '-')}", str(value)] if value is not None else []
    for key, value in r.options.items():
        words += ["--set", f"{key}={value}"]
    return shlex.join(words)
