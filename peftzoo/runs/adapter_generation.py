"""Methods that generate adapter weights from a task description: train one on several tasks, then measure
what it saves compared with the description in the context.

A description is what an untuned model would have in front of every prompt: the task in words and a few worked
examples. The method reads it once, its weights are merged, and the model runs on the prompt alone. Every task
is scored as for a causal model, by generation or by multiple choice.
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
from peftzoo.scoring import evaluation, library_metrics
from peftzoo.tasks import run_data, sources, task_files
from peftzoo.training import batches, config
from peftzoo.training.config import TrainConfig
from peftzoo.training.loop import Loop, NonFinite, TrainingStats

Progress = Callable[[str, int, int], None]
"""on_progress(stage, done, total): stage is a phrase such as `training`."""


@dataclass(frozen=True)
class Request:
    """What to train and score. `train_config` fills the missing fields of `train` from tasks and method."""

    method: str
    tasks: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    """Tasks that are not trained on; their descriptions are read after training."""
    model: str = "embedded"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    """Overrides of `TrainConfig` fields; None stands for the recommended value."""
    shots: int = 2
    """Worked examples in a description."""
    limit: int | None = None
    precision: str = "auto"
    source: str | None = None
    data: str | None = None
    eval_batch: int = 32
    trust_task_code: bool = False


class DescribedTask:
    """A task, its rows and its description; and its prompts, with the description in front and without.

    `prompts_with_description` and `prompts_alone` are lm-eval task objects over the same rows. `seen` says
    whether the task is trained on.
    """

    def __init__(self, name: str, request: Request, tokenizer: Any) -> None:
        task, mirror = task_files.get(name), sources.mirror_folder(request.data)
        source = sources.select_source(request.source, request.model, mirror, named=request.data is not None)
        library_metrics.check_trusted(task, request.trust_task_code)
        self.task, self.seen, self.tokenizer = task, name in request.tasks, tokenizer
        self.rows = sources.load(task, source, mirror)
        if request.limit:
            self.rows.test = self.rows.test.select(range(min(request.limit, len(self.rows.test))))
        self.settings = task.extra.embedded.settings if source == "embedded" else task.extra.settings
        self.metric = task.extra.metric if task.extra.metric in task.metrics() else task.metrics()[0]
        self.prompts_alone = self._prompts("")
        shots = ["".join(self._example(self.rows.train[i])) for i in range(request.shots)]
        self.description = "\n\n".join([task.instruction.strip(), *shots])
        self.prompts_with_description = self._prompts("{% raw %}" + self.description + "\n\n{% endraw %}")

    def _prompts(self, description: str) -> Any:
        """lm-eval's task object with this text in front of every prompt."""
        task = self.task.model_copy(update={"description": description, "num_fewshot": 0})
        return evaluation.harness_task(task, self.rows, self.settings.max_new_tokens)

    def _example(self, row: dict[str, Any]) -> tuple[str, str]:
        """Prompt and answer of a row, without the description."""
        return evaluation.prompt_and_answer(self.prompts_alone, row)

    def example(self, i: int) -> batches.Example:
        """Row i of the train set as a training example, without the description."""
        prompt, answer = self._example(self.rows.train[i])
        return batches.language_example(self.tokenizer, prompt, answer, self.settings.max_length)

    @cached_property
    def prompt_lengths(self) -> dict[str, float]:
        """Mean number of tokens of the scored prompts: `told` with the description, `bare` without."""
        prompts = {"told": self.prompts_with_description, "bare": self.prompts_alone}
        return {
            k: statistics.fmean(len(self._token_ids(p, row)) for row in self.rows.test)
            for k, p in prompts.items()
        }

    def _token_ids(self, prompts: Any, row: dict[str, Any]) -> list[int]:
        return self.tokenizer(prompts.fewshot_context(row, 0))["input_ids"]

    def first_prompt(self, prompts: Any, device: torch.device) -> torch.Tensor:
        """Token ids of the first scored prompt, (1, T), on `device`."""
        return torch.tensor([self._token_ids(prompts, self.rows.test[0])], device=device)


def prepare(request: Request) -> tuple[models.Loaded, Adapter, list[DescribedTask]]:
    """Load the model, configure the method and read the tasks.

    Raises `UserError` if the method reads no description, the model is an encoder, a task is named both as
    trained and as unseen, or the method's options do not fit the model.
    """
    cls = registry.get(request.method)
    if not cls.described:
        others = [name for name in registry.methods() if registry.get(name).described]
        raise UserError(f'method "{cls.name}" reads no description; these do: {", ".join(others)}')
    if not models.is_causal(request.model):
        raise UserError(f'model "{request.model}" is an encoder: name a causal one (--model embedded)')
    if both := sorted({*request.tasks} & {*request.unseen}):
        raise UserError(f'task "{both[0]}" is trained on, so it is not unseen: name it once')
    attach(models.on_meta(request.model), configure(cls, request.options))  # raises if the options do not fit
    loaded = models.load(request.model)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    subjects = [DescribedTask(n, request, loaded.tokenizer) for n in (*request.tasks, *request.unseen)]
    return loaded, configure(cls, request.options), subjects


def overlaps(subjects: list[DescribedTask]) -> dict[str, Any]:
    """Counts of scored rows that are also training rows of a seen task, for the report.

    Raises `UserError` where the task does not allow an overlap (`run_data.overlaps`).
    """
    eval_sets = [run_data.EvalSet(s.task, s.rows) for s in subjects]
    return run_data.overlaps(eval_sets, [run_data.TrainSet(s.task, s.rows.train) for s in subjects if s.seen])


def train_config(request: Request, subjects: list[DescribedTask]) -> TrainConfig:
    """The training settings: the sum of the seen tasks' steps, and the largest of their other settings.

    Fields of `request.train` override them. Raises `UserError` for a value out of range.
    """
    settings = [s.settings for s in subjects if s.seen]
    fields = {
        "steps": sum(s.steps for s in settings), "batch_size": max(s.batch_size for s in settings),
        "max_length": max(s.max_length for s in settings),
        "lr": registry.get(request.method).lr * max(s.lr_scale for s in settings),
        "precision": config.precision_of(request.precision),
    }  # fmt: skip
    return config.checked(fields | {k: v for k, v in request.train.items() if v is not None})


def train(
    attached: Attached, subjects: list[DescribedTask], config: TrainConfig, seed: int, on_progress: Progress
) -> TrainingStats:
    """Train on the seen tasks in turn; each batch is of one task, with weights from its description.

    Raises `UserError` if the loss or the gradient is not finite.
    """
    from accelerate import Accelerator

    seen = [s for s in subjects if s.seen]
    rows, task_batches = [], []
    for index, s in enumerate(seen):
        start, count = len(rows), len(s.rows.train)
        steps = -(-config.steps // len(seen))
        plan = batches.batch_order([0] * count, steps, config.batch_size, seed + index)
        task_batches.append([[start + i for i in batch] for batch in plan])
        rows += [(s, i) for i in range(count)]
    loop = Loop(
        attached, batches.LazyExamples(rows, lambda row: row[0].example(row[1])), config,
        pad=seen[0].tokenizer.pad_token_id, seed=seed,
        accelerator=Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no"),
        on_step=lambda step, total, *_: on_progress("training", step, total),
        order=[task_batches[step % len(seen)][step // len(seen)] for step in range(config.steps)],
        on_batch=lambda batch: attached.adapter.describe(rows[batch[0]][0].description),
    )  # fmt: skip
    try:
        return loop.run()
    except NonFinite as error:
        raise UserError(f"training broke down, {error}: lower --lr (now {config.lr:g})") from None


def score(
    loaded: models.Loaded, subject: DescribedTask, prompts: Any, batch_size: int, precision: str
) -> dict[str, Any]:
    """The model's score with these prompts, its standard error, and milliseconds per row in batches."""
    scores = evaluation.score_language(
        loaded.model, loaded.tokenizer, prompts, batch_size, precision, subject.metric
    )
    return {
        "value": scores.metrics[subject.metric], "stderr": scores.stderr.get(subject.metric),
        "row_ms": round(scores.seconds / scores.rows * 1e3, 3),
    }  # fmt: skip


def run(request: Request, out: Path, on_progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Train, save the generator in `out/generator` and the report in `out/gain.json`; returns the report.

    For each task the report has three scores. `bare`: the base model on the prompt alone; `told`: the base
    model with the description in front of the prompt; `written`: the model with the generated weights merged,
    on the prompt alone. Times to the first token are of the merged model, with the description and without:
    it has the shapes of the base, so that only the length of the prompt differs.
    """
    loaded, adapter, subjects = prepare(request)
    config, device = train_config(request, subjects), loaded.model.device
    overlap = overlaps(subjects)
    tasks = {
        s: {"task": s.task.name, "seen": s.seen, "metric": s.metric, "rows": len(s.rows.test)}
        for s in subjects
    }
    scoring = request.eval_batch, config.precision
    for index, s in enumerate(subjects):
        on_progress("scoring the base", index, len(subjects))
        tasks[s]["bare"] = score(loaded, s, s.prompts_alone, *scoring)
        tasks[s]["told"] = score(loaded, s, s.prompts_with_description, *scoring)
    attached = attach(loaded.model, adapter, seed=request.seed, tokenizer=loaded.tokenizer)
    stats = train(attached, subjects, config, request.seed, on_progress)
    adapter.describe("")  # the context_cost generator belongs to no task
    method_config = adapter.config.model_dump(mode="json")
    saving.save(
        attached, out / "generator", model=loaded.name, tasks=[s.task.name for s in subjects if s.seen]
    )
    for index, s in enumerate(subjects):
        on_progress("writing and scoring", index, len(subjects))
        begin = time.perf_counter()
        adapter.describe(s.description)
        with attached.merged():
            tasks[s]["written_ms"] = round((time.perf_counter() - begin) * 1e3, 3)
            tasks[s]["written"] = score(loaded, s, s.prompts_alone, *scoring)
            tasks[s] |= context_cost(loaded.model, s, device, config.precision)
    report = {
        "command": command(request), "method": adapter.name, "method_config": method_config,
        "model": loaded.name, "model_source": loaded.source, "seed": request.seed, "shots": request.shots,
        "train_config": config.model_dump(mode="json"), "trainable_params": attached.trainable_count(),
        "train_seconds": round(stats.seconds, 3), "losses": [round(x, 6) for x in stats.losses],
        "environment": counters.environment(), "tasks": list(tasks.values()), **overlap,
    }  # fmt: skip
    write_atomically(out / "gain.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def context_cost(model: nn.Module, s: DescribedTask, device: torch.device, precision: str) -> dict[str, Any]:
    """Prompt tokens and milliseconds to the first token: `told` with the description, `bare` without."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        described, alone = (
            counters.generation_latency(model, s.first_prompt(prompts, device), new_tokens=2, rounds=9)
            for prompts in (s.prompts_with_description, s.prompts_alone)
        )
    first_token_ms = {"told": described["first_token_ms"], "bare": alone["first_token_ms"]}
    return {"prompt_tokens": s.prompt_lengths, "first_token_ms": first_token_ms}


def command(request: Request) -> str:
    """The command line that repeats this request; `FOLDER` stands for local paths."""
    r = request
    is_folder = r.model not in {m["name"] for m in models.known()} and Path(r.model).expanduser().exists()
    arguments = ["peftzoo", "generate", "--method", r.method, "--tasks", ",".join(r.tasks)]
    arguments += ["--unseen", ",".join(r.unseen)] if r.unseen else []
    arguments += [
        "--model",
        "FOLDER" if is_folder else r.model,
        "--shots",
        str(r.shots),
        "--seed",
        str(r.seed),
    ]
    arguments += ["--source", r.source] if r.source else []
    arguments += ["--data", "FOLDER"] if r.data else []
    for key, value in ({"limit": r.limit, "precision": r.precision} | r.train).items():
        arguments += [f"--{key.replace('_', '-')}", str(value)] if value is not None else []
    for key, value in r.options.items():
        arguments += ["--set", f"{key}={value}"]
    return shlex.join(arguments)
