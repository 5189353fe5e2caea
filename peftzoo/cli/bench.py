"""`peftzoo bench`: train and score methods on tasks."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

from peftzoo.cli import _run_tables, output


def add(app: typer.Typer) -> None:
    """Register the command."""
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
    max_new_tokens: int = typer.Option(None, min=1, help="Tokens per generated answer, at most."),
    train_on_prompt: bool = typer.Option(False, "--train-on-prompt", help="Loss on the prompt too."),
    precision: str = typer.Option("auto", help="auto, fp32 or bf16."),
    hold_out: int = typer.Option(None, min=1, help="Training rows of each task kept out, for their loss."),
    early_stop: int = typer.Option(
        None,
        min=1,
        max=20,
        metavar="K",
        help="Stop after K of 20 checks without a lower loss on --hold-out rows (default 1000, at most half) "
        "and report the state with the lowest.",
    ),
    limit: int = typer.Option(None, min=1, help="Score only the first rows."),
    eval_batch: int = typer.Option(32, min=1, help="Rows per scoring batch."),
    prune: str = typer.Option(None, help="Prune the base model first: magnitude:0.5, wanda:0.5, wanda:2:4."),
    retention: str = typer.Option(None, metavar="TASK", help="Loss on this task's text, before and after."),
    data: str = typer.Option(None, help="Folder of a local data mirror (or PEFTZOO_DATA)."),
    source: str = typer.Option(None, help="embedded, mirror or hub."),
    out: Path = typer.Option(Path("runs"), help="Folder for records."),
    force: bool = typer.Option(False, help="Run again even if the record is there."),
    pack: str = typer.Option(
        "1", metavar="N", help="Train N runs of a task on one copy of the model: a number, auto, or 16GB."
    ),
    score_together: bool = typer.Option(
        None, "--score-together/--score-apart", help="Score a pack in shared batches (default: on a GPU)."
    ),
    track: str = typer.Option("none", help="wandb, trackio, or none."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that comes with a model."),
    trust_task_code: bool = output.TRUST_TASK_CODE,
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Train and score methods on tasks, and write a record per run."""
    from peftzoo.contract.registry import methods
    from peftzoo.errors import UserError
    from peftzoo.runs import quick_checks
    from peftzoo.runs.trackers import make_tracker
    from peftzoo.tasks import task_files
    from peftzoo.units import parse_pack_size

    output.load_plugins(plugin)
    task_names = output.parse_names(task, task_files.tasks(), "task")
    members = {name: tuple(task_files.expand([name])) for name in task_names}
    method_names = output.parse_names(method, methods(), "method")
    options = output.parse_set(set_, method_names)
    seed_numbers = output.parse_seeds(seeds)
    if epochs is not None and steps is not None:
        raise UserError(f"--epochs {epochs:g} and --steps {steps} say the same: keep one of them")
    train = {
        "steps": steps, "epochs": epochs, "batch_size": batch_size, "micro_batch": micro_batch, "lr": lr,
        "head_lr": head_lr, "schedule": schedule, "warmup": warmup, "clip": clip, "max_length": max_length,
        "train_on_prompt": train_on_prompt or None,
    }  # fmt: skip
    quick_checks.check_methods(method_names)
    quick_checks.check_tasks([*task_names, *filter(None, [retention])])
    quick_checks.check_protocol(protocol, task_files.expand(task_names))
    quick_checks.check_model(model, prune)
    quick_checks.check_data(model, source, data)
    quick_checks.check_training(train, precision)
    make_tracker(track)
    if track == "trackio":
        quick_checks.check_installed(track)
    size, memory_budget = parse_pack_size("--pack", pack)
    if size == 1 and score_together is not None:
        raise UserError("--score-together and --score-apart are for packs: add --pack N")
    if size != 1 and track != "none":
        raise UserError("--pack and --track: the curves of a pack are not sent; leave one of them out")
    output.make_folder(out)
    from peftzoo.runs.plan import Request, resolve  # heavy: what is wrong above is told before
    from peftzoo.runs.run import is_on_record, new_record

    common = {
        "model": model, "protocol": protocol, "preset": preset,
        "train": {k: v for k, v in train.items() if v is not None},
        "precision": precision, "source": source, "data": data, "limit": limit,
        "max_new_tokens": max_new_tokens, "eval_batch": eval_batch, "prune": prune, "retention": retention,
        "trust_remote_code": trust_remote_code, "trust_task_code": trust_task_code,
        "validation": hold_out, "early_stop": early_stop,
    }  # fmt: skip
    groups = {name: tasks for name, tasks in members.items() if tasks != (name,)}
    requests = [
        Request(method=m, task=t, seed=s, options=options[m], **common)
        for t in task_files.expand(task_names)
        for m in method_names
        for s in seed_numbers
    ]
    with redirect_stdout(sys.stderr):
        plans, notes = resolve(
            requests, skip="all" in (method, task) or bool(groups),
            done=lambda plan: not force and is_on_record(out, new_record(plan)),
        )  # fmt: skip
        for note in notes:
            output.note(note)
        if size == 1:
            results = _run_each(plans, out, force, track)
        else:
            pack_options = {
                "size": size,
                "memory_budget": memory_budget,
                "force": force,
                "score_together": score_together,
            }
            results = _run_in_packs(plans, out, pack_options)
    if _is_main_process():
        _run_tables.print_results(results, json, groups)
    if any(record.status != "ok" for record, _, _ in results):
        raise typer.Exit(1)


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _run_each(plans: list[Any], out: Path, force: bool, track: str) -> list[Any]:
    """Do the runs one after another, with a progress bar for each; returns (record, file, new) of each."""
    from rich.progress import TextColumn, TimeRemainingColumn

    from peftzoo.runs.run import run
    from peftzoo.runs.trackers import make_tracker

    results = []
    bar = output.progress_bar(TextColumn("{task.fields[values]}", markup=False), TimeRemainingColumn())
    bar.disable = bar.disable or not _is_main_process()
    with bar:
        for plan in plans:
            request = plan.request
            title = f"{request.method} on {request.task}, seed {request.seed}"
            line = bar.add_task(f"{title}: loading", total=1, values="")
            log = output.LogLines(title)

            def on_progress(stage: str, step: int, total: int, values: dict[str, float],
                            line: Any = line, title: str = title, log: Any = log) -> None:  # fmt: skip
                if bar.disable and _is_main_process():
                    log(stage, step, total, values)
                text = f"loss {values['loss']:.3f}" if values else ""
                activity = output.ACTIVITIES[stage]
                bar.update(line, description=f"{title}: {activity}", completed=step, total=total, values=text)

            record, path, new = run(plan, out, force=force, progress=on_progress, tracker=make_tracker(track))
            status = record.status if new else "on record (--force runs it again)"
            score = _run_tables.score_or_reason(record)
            bar.update(line, description=f"{title}: {status}", completed=1, total=1, values=score)
            if bar.disable and _is_main_process():  # a log file gets a line per run
                output.note(f"{title}: {status}, {score}")
            results.append((record, path, new))
    return results


def _run_in_packs(plans: list[Any], out: Path, options: dict[str, Any]) -> list[Any]:
    """Do the runs in packs, with a progress bar per task; `options` are keyword arguments of `run_packs`."""
    from peftzoo.runs.packs import run_packs

    by_task: dict[str, list[Any]] = {}
    for plan in plans:
        by_task.setdefault(plan.request.task, []).append(plan)
    results = []
    with output.progress_bar() as bar:
        for task, task_plans in by_task.items():
            title = f"{len(task_plans)} runs on {task}"
            line = bar.add_task(f"{title}: loading", total=1)

            def on_progress(stage: str, step: int, total: int, values: dict[str, float],
                            line: Any = line, title: str = title) -> None:  # fmt: skip
                activity = output.ACTIVITIES[stage]
                activity += f" {values['runs']:.0f} at once" if "runs" in values else ""
                bar.update(line, description=f"{title}: {activity}", completed=step, total=total)

            task_results = run_packs(task_plans, out, progress=on_progress, note=output.note, **options)
            bar.update(line, description=f"{title}: done", completed=1, total=1)
            for record, _, new in task_results:
                status = record.status if new else "on record (--force runs it again)"
                pack = f", in a pack of {record.packed['runs']}" if record.packed else ""
                output.note(f"{record.name}: {status}{pack}, {_run_tables.score_or_reason(record)}")
            results += task_results
    return results
