"""Scoring: generation and choices through lm-evaluation-harness, trained heads by `metrics`."""

from __future__ import annotations

import io
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftzoo.errors import UserError
from peftzoo.scoring import library_metrics, metrics
from peftzoo.tasks.task_files import Task
from peftzoo.training.batches import Example, by_length, collate

INVALID = "[invalid]"
"""What lm-eval's regex filter returns when an answer cannot be parsed."""


@dataclass
class Scores:
    """Scores of one model on one task.

    `metrics` and their standard errors by lm-eval's names, None where undefined; `unparsed`: the share of
    answers that could not be parsed, for generation; `outcomes`: one entry per row and filter, for paired
    tests.
    """

    metrics: dict[str, float | None]
    stderr: dict[str, float | None]
    rows: int
    unparsed: float | None = None
    seconds: float = 0.0
    outcomes: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class TargetScale:
    """How a head's outputs relate to the task's own targets: target = output * spread + mean."""

    mean: float = 0.0
    spread: float = 1.0


def harness_task(task: Task, rows: Any, max_new_tokens: int | None = None, name: str | None = None) -> Any:
    """lm-eval's task object over these rows (`sources.Rows`); training uses the same prompts.

    `name` replaces the task's name, which each request carries as `task_name`: it tells apart the requests of
    several models that are scored together. Raises `UserError` for a metric that cannot be had.
    """
    from peftzoo.scoring._harness_task import HarnessTask

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _sandbox_templates()
    config = task.harness() | ({"task": name} if name else {})
    config["metric_list"] = library_metrics.for_harness(task)
    if task.output_type == "generate_until":
        kwargs = {"do_sample": False} | (config.get("generation_kwargs") or {})
        config["generation_kwargs"] = kwargs | ({"max_gen_toks": max_new_tokens} if max_new_tokens else {})
    config.pop("training_split", None)  # neither prompts nor scores need the training rows
    return HarnessTask(config, task.eval_split, rows.test, rows.fewshot)


def _sandbox_templates() -> None:
    """Let lm-eval render the templates of task files in Jinja's sandbox: they reach nothing of Python."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, ImmutableSandboxedEnvironment):
        original, utils.env = utils.env, ImmutableSandboxedEnvironment(
            loader=utils.env.loader, undefined=utils.env.undefined,
            keep_trailing_newline=utils.env.keep_trailing_newline,
        )  # fmt: skip
        utils.env.filters |= original.filters


def prompt_and_answer(lm_task: Any, row: dict[str, Any]) -> tuple[str, str]:
    """The prompt of a row, as lm-eval makes it, and the correct continuation, delimiter included."""
    prompt, answer = lm_task.fewshot_context(row, lm_task.config.num_fewshot), lm_task.doc_to_target(row)
    choices = lm_task.doc_to_choice(row) if lm_task.config.doc_to_choice is not None else None
    if lm_task.multiple_input:  # the choices are contexts, the target is their common continuation
        prompt = prompt[lm_task.doc_to_text(row)]
    elif choices is not None and answer not in choices:
        answer = choices[int(answer)]
    return prompt, lm_task.config.target_delimiter + str(answer)


def score_language(
    model: nn.Module,
    tokenizer: Any,
    lm_task: Any,
    batch_size: int,
    precision: str = "fp32",
    metric: str = "",
    on_requests: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores of a causal model by greedy generation or by log-likelihood of choices, as the task says.

    `batch_size`: rows per forward pass. `unparsed` is counted with the filter that `metric` names.
    `on_requests(done, total)` follows the answers to lm-eval's requests.
    """
    from peftzoo.scoring.language_model import LanguageModel

    lm = LanguageModel(model, tokenizer, batch_size, torch.bfloat16 if precision == "bf16" else None)
    if on_requests:
        lm.on_requests = on_requests
    return run_tasks(lm, [lm_task], metric)[0]


def run_tasks(lm: Any, lm_tasks: list[Any], metric: str = "") -> list[Scores]:
    """Scores of the lm-eval model `lm` on tasks with different names; it gets all their requests at once.

    The time is shared equally among the tasks.
    """
    from lm_eval.evaluator import evaluate

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap would start a process per core
    begin = time.perf_counter()
    tasks = {"tasks": {t.config.task: t for t in lm_tasks}, "groups": {}, "group_map": {}}
    with redirect_stdout(io.StringIO()):  # it prints the names of the scores that it bootstraps
        results = evaluate(lm, tasks, bootstrap_iters=200, log_samples=True)
    seconds = (time.perf_counter() - begin) / len(lm_tasks)
    return [_task_scores(results, t, metric, seconds) for t in lm_tasks]


def _task_scores(results: dict[str, Any], lm_task: Any, metric: str, seconds: float) -> Scores:
    """One task's scores from what lm-eval's `evaluate` returned."""
    name = lm_task.config.task
    scores = {
        k: v for k, v in results["results"][name].items() if isinstance(v, (int, float)) and k != "sample_len"
    }
    values = {_metric_name(k): _finite(v) for k, v in scores.items() if "_stderr" not in k}
    errors = {_metric_name(k.replace("_stderr", "")): _finite(v) for k, v in scores.items() if "_stderr" in k}
    if metric and metric not in values:
        raise UserError(f'task "{name}": metric "{metric}" is not among its results: {", ".join(values)}')
    samples = results["samples"][name]
    outcomes = [_outcome(s, lm_task) for s in samples]
    filter_name = metric.rpartition(",")[2] if "," in metric else samples[0]["filter"]
    filtered = [s for s in samples if s["filter"] == filter_name]
    unparsed = None
    if lm_task.OUTPUT_TYPE == "generate_until":
        unparsed = sum(s["filtered_resps"][0] == INVALID for s in filtered) / len(filtered)
    return Scores(values, errors, len(filtered), unparsed, seconds, outcomes)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _metric_name(name: str) -> str:
    """lm-eval's name without an empty filter: `acc,none` becomes `acc`, `exact_match,strict` stays."""
    return name.removesuffix(",none")


def _outcome(sample: dict[str, Any], lm_task: Any) -> dict[str, Any]:
    """One row's outcome: its number in the source, filter, the answer, and the row's metrics."""
    row_metrics = {k: sample[k] for k in sample.get("metrics", []) if isinstance(sample.get(k), (int, float))}
    answer = sample["filtered_resps"]
    if lm_task.OUTPUT_TYPE == "multiple_choice":
        answer = [round(float(r[0]), 4) if math.isfinite(r[0]) else None for r in answer]
    row = lm_task.row_ids[sample["doc_id"]]
    return {"row": row, "filter": sample["filter"], "answer": answer, **row_metrics}


@torch.no_grad()
def score_head(
    model: nn.Module,
    examples: list[Example],
    metric_names: list[str],
    kind: str,
    scale: TargetScale,
    pad: int,
    batch_size: int,
    library: Sequence[str] = (),
    row_ids: Sequence[int] | None = None,
) -> Scores:
    """Scores of a trained head on all examples, whose `target` is the reference.

    `kind`: classification or regression; `pad`: the padding token's id; `batch_size`: rows per forward pass;
    `library`: which of the metrics are those of the library `evaluate` (they get no standard error);
    `row_ids`: the examples' numbers for the outcomes, by default their places.
    """
    begin = time.perf_counter()
    device = next(model.parameters()).device
    predictions = [0.0] * len(examples)
    for rows in by_length(examples, batch_size):
        batch = collate([examples[i] for i in rows], pad)
        logits = model(
            input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
        ).logits.float()
        values = logits.argmax(-1) if kind == "classification" else logits.squeeze(-1)
        for i, value in zip(rows, values.tolist(), strict=True):
            predictions[i] = value * scale.spread + scale.mean
    references = [e.target * scale.spread + scale.mean for e in examples]
    own = [n for n in metric_names if n not in library]
    values = metrics.compute(own, predictions, references)
    values |= {n: library_metrics.compute_head(n, predictions, references) for n in library}
    errors = {n: metrics.standard_error(n, predictions, references) for n in own}
    return Scores(
        {n: values[n] for n in metric_names},
        errors | dict.fromkeys(library),
        len(examples),
        None,
        time.perf_counter() - begin,
        [
            {"row": i, "answer": p, "reference": r}
            for i, p, r in zip(row_ids or range(len(examples)), predictions, references, strict=True)
        ],
    )
