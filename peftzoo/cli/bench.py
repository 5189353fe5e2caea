"""`peftzoo bench`: train and score methods on tasks."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    app.command(epilog="Example: peftzoo bench --method lora,unilora --task sst2 --seeds 0,1")(bench)


def bench(
    method: str = typer.Option(..., "--method", "-m", help="Methods, with commas, or all."),
    task: str = typer.Option(..., "--task", "-t", help="Tasks or groups, with commas, all, or a .yaml file."),
    model: str = typer.Option("embedded", help="embedded, an alias, a Hub id or a folder."),
    seeds: str = typer.Option("0", "--seeds", "--seed", help="Seeds, with commas."),
    protocol: str = typer.Option(None, help="Another protocol of the task (peftzoo show TASK)."),
    preset: str = typer.Option(None, help="A published setting of the method (peftzoo show METHOD)."),
    set_: list[str] = output.SET,
    steps: int = typer.Option(None, help="Optimiser steps (default: the task's)."),
    epochs: float = typer.Option(None, help="Passes over the training rows, instead of steps."),
    batch_size: int = typer.Option(None, help="Rows per step (default: the task's)."),
    micro_batch: int = typer.Option(None, help="Rows per forward pass (default: the whole batch)."),
    lr: float = typer.Option(None, help="Learning rate (default: the method's)."),
    head_lr: float = typer.Option(None, help="Learning rate of a fresh head (default 1e-3)."),
    schedule: str = typer.Option(None, help="linear, cosine or constant_with_warmup."),
    warmup: float = typer.Option(None, help="Warm-up, as a share of the steps (default 0.06)."),
    clip: float = typer.Option(None, help="Largest gradient norm (default 1)."),
    max_length: int = typer.Option(None, help="Tokens per row, at most."),
    max_new_tokens: int = typer.Option(None, help="Tokens per generated answer, at most."),
    train_on_prompt: bool = typer.Option(False, "--train-on-prompt", help="Loss on the prompt too."),
    precision: str = typer.Option("auto", help="auto, fp32 or bf16."),
    limit: int = typer.Option(None, help="Score only the first rows."),
    eval_batch: int = typer.Option(32, min=1, help="Rows per scoring batch."),
    prune: str = typer.Option(None, help="Prune the base model first: magnitude:0.5, wanda:0.5, wanda:2:4."),
    retention: str = typer.Option(None, metavar="TASK", help="Loss on this task's text, before and after."),
    data: str = typer.Option(None, help="Folder of a local data mirror (or PEFTZOO_DATA)."),
    source: str = typer.Option(None, help="embedded, mirror or hub."),
    out: Path = typer.Option(Path("results"), help="Folder for records."),
    force: bool = typer.Option(False, help="Run again even if the record is there."),
    pack: str = typer.Option(
        "1", metavar="N", help="Train N runs of a task on one copy of the model: a number, auto, or 16GB."
    ),
    score_together: bool = typer.Option(
        None, "--score-together/--score-apart", help="Score a pack in shared batches (default: on a GPU)."
    ),
    track: str = typer.Option("none", help="wandb, trackio, or none."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that comes with a model."),
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Train and score each method on each task, write a record per run."""
    from peftzoo.contract.registry import methods
    from peftzoo.errors import UserError
    from peftzoo.runs.packs import parse
    from peftzoo.runs.plan import Request, resolve
    from peftzoo.runs.trackers import tracker
    from peftzoo.tasks import task_files

    output.load_plugins(plugin)
    if epochs is not None and steps is not None:
        raise UserError(f"--epochs {epochs:g} and --steps {steps} say the same: keep one of them")
    train = {
        "steps": steps, "epochs": epochs, "batch_size": batch_size, "micro_batch": micro_batch, "lr": lr,
        "head_lr": head_lr, "schedule": schedule, "warmup": warmup, "clip": clip, "max_length": max_length,
        "train_on_prompt": train_on_prompt or None,
    }  # fmt: skip
    common = {
        "model": model, "protocol": protocol, "preset": preset,
        "train": {k: v for k, v in train.items() if v is not None},
        "precision": _precision(precision), "source": source, "data": data, "limit": limit,
        "max_new_tokens": max_new_tokens, "eval_batch": eval_batch, "prune": prune, "retention": retention,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    tracker(track)
    size, memory_budget = parse("--pack", pack)
    if size == 1 and score_together is not None:
        raise UserError("--score-together and --score-apart are for packs: add --pack N")
    if size != 1 and track != "none":
        raise UserError("--pack and --track: the curves of a pack are not sent; leave one of them out")
    named = output.names(task, task_files.tasks(), "task")
    groups = {name: tuple(task_files.expand([name])) for name in named if task_files.expand([name]) != [name]}
    chosen = output.names(method, methods(), "method")
    given = output.parse_set(set_, chosen)
    requests = [
        Request(method=m, task=t, seed=s, options=given[m], **common)
        for t in task_files.expand(named)
        for m in chosen
        for s in _seeds(seeds)
    ]
    with redirect_stdout(sys.stderr):
        output.folder(out)
        plans, notes = resolve(requests, skip="all" in (method, task) or bool(groups))
        for note in notes:
            output.note(note)
        if size == 1:
            done = _all(plans, out, force, track)
        else:
            how = {
                "size": size,
                "memory_budget": memory_budget,
                "force": force,
                "score_together": score_together,
            }
            done = _packs(plans, out, how)
    if _is_main_process():
        report(done, json, groups)
    if any(record.status != "ok" for record, _, _ in done):
        raise typer.Exit(1)


def _precision(given: str) -> str:
    from peftzoo.errors import UserError

    if given not in ("auto", "fp32", "bf16"):
        raise UserError(f'precision "{given}": one of auto, fp32, bf16')
    return given


def _seeds(text: str) -> list[int]:
    from peftzoo.errors import UserError

    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f'--seeds "{text}": whole numbers with commas, for example 0,1,2') from None
    if any(not 0 <= s < 2**31 for s in found):
        raise UserError(f'--seeds "{text}": each from 0 to {2**31 - 1}')
    return list(dict.fromkeys(found))


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _all(plans: list[Any], out: Path, force: bool, track: str) -> list[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from peftzoo.runs.run import run
    from peftzoo.runs.trackers import tracker

    done = []
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[values]}", markup=False), TimeElapsedColumn(), console=console,
        disable=not (console.is_terminal and _is_main_process()),
    )  # fmt: skip
    with bar:
        for plan in plans:
            request = plan.request
            title = f"{request.method} on {request.task}, seed {request.seed}"
            line = bar.add_task(f"{title}: loading", total=1, values="")

            def follow(stage: str, step: int, total: int, values: dict[str, float],
                       line: Any = line, title: str = title) -> None:  # fmt: skip
                words = {"load": "loading", "train": "training", "score": "scoring"}[stage]
                shown = (
                    f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tok/s" if values else ""
                )
                bar.update(line, description=f"{title}: {words}", completed=step, total=total, values=shown)

            record, path, new = run(plan, out, force=force, progress=follow, tracker=tracker(track))
            word = record.status if new else "on record (--force runs it again)"
            bar.update(line, description=f"{title}: {word}", completed=1, total=1, values=short(record))
            if bar.disable and _is_main_process():  # a log file gets a line per run
                output.note(f"{title}: {word}, {short(record)}")
            done.append((record, path, new))
    return done


def _packs(plans: list[Any], out: Path, how: dict[str, Any]) -> list[Any]:
    """Runs of one task and model in packs, with a line for each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from peftzoo.runs.packs import run_packs

    by_task: dict[str, list[Any]] = {}
    for plan in plans:
        by_task.setdefault(plan.request.task, []).append(plan)
    done, console = [], Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        for task, members in by_task.items():
            title = f"{len(members)} runs on {task}"
            line = bar.add_task(f"{title}: loading", total=1)

            def follow(stage: str, step: int, total: int, values: dict[str, float],
                       line: Any = line, title: str = title) -> None:  # fmt: skip
                words = {"load": "loading", "train": "training", "score": "scoring"}[stage]
                words += f" {values['runs']:.0f} at once" if "runs" in values else ""
                bar.update(line, description=f"{title}: {words}", completed=step, total=total)

            found = run_packs(members, out, progress=follow, note=output.note, **how)
            bar.update(line, description=f"{title}: done", completed=1, total=1)
            for record, _, new in found:
                word = record.status if new else "on record (--force runs it again)"
                shared = f", in a pack of {record.packed['runs']}" if record.packed else ""
                output.note(f"{record.name}: {word}{shared}, {short(record)}")
            done += found
    return done


def short(record: Any) -> str:
    """A run's score, or why it has none."""
    if record.result is None:
        return record.reason or ""
    return f"{record.result.metric} {output.number(record.result.value)}"


def report(done: list[Any], json: bool, groups: dict[str, tuple[str, ...]]) -> None:
    """A table per task of (record, file, new), or all records as JSON."""
    if json:
        output.as_json([record.model_dump(mode="json") for record, _, _ in done])
        return
    by_task: dict[str, list[Any]] = {}
    for record, _, _ in done:
        by_task.setdefault(record.task, []).append(record)
    for task, records in by_task.items():
        first = records[0]
        about = f"{first.data['scored_rows']} rows, {first.data['source']} data, {first.protocol}"
        title = f"{task} on {first.model}: {about}"
        output.table(title, COLUMNS, [_row(r) for r in records], right=COLUMNS[2:])
    for name, members in groups.items():
        _average(name, members, [record for record, _, _ in done])
    for record, path, _ in done:
        print(f"{record.status}: {path}" + (f" ({record.reason})" if record.reason else ""))


def _average(name: str, members: tuple[str, ...], records: list[Any]) -> None:
    from peftzoo.boards import tables

    rows = [
        [r["method"], r["seed"], f"{r['tasks']} of {len(members)}", r["metric"], output.number(r["score"])]
        for r in tables.averages(records, members)
    ]
    columns = ("method", "seed", "tasks", "metric", "mean")
    output.table(f"{name}: mean over its tasks", columns, rows, right=("tasks", "mean"))


COLUMNS = (
    "method",
    "seed",
    "score",
    "+-",
    "unmerged",
    "unparsed",
    "trained",
    "step ms",
    "tok/s",
    "memory MiB",
    "ms/token",
)


def _row(r: Any) -> list[Any]:
    def score(s: Any) -> str:
        return output.number(s.value if s else None)

    memory = r.memory.get("computed_total")
    return [
        r.method, r.seed, f"{r.result.metric} {score(r.result)}" if r.result else r.status,
        output.number(r.result.stderr) if r.result else "", score(r.score) if r.merged_score else "",
        output.number(r.result.unparsed, 2) if r.result else "", output.count(r.trainable_params),
        output.number(r.step_time.get("median_ms"), 1), output.number(r.tokens_per_second, 0),
        output.number(memory / 2**20 if memory else None, 0),
        output.number(r.latency.get("token_ms", r.latency.get("forward_ms")), 2),
    ]  # fmt: skip
