"""`peftzoo tune`: choose the learning rate, or other options, of methods by held-out loss, and run them."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

from peftzoo.cli import _run_tables, output
from peftzoo.cli import sweep as sweeping


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo tune --method lora,dora --task sst2 --lr-grid 7")(tune)


def tune(
    method: str = typer.Option(..., "--method", "-m", help="Methods, with commas, or all."),
    task: str = typer.Option(..., "--task", "-t", help="Tasks or groups, with commas, all, or a .yaml file."),
    model: str = typer.Option("embedded", help="embedded, an alias, a Hub id or a folder."),
    seeds: str = typer.Option("0,1,2,3,4", help="Seeds of the final runs, with commas."),
    lr_grid: int = typer.Option(
        None, min=2, max=25, help="Learning rates, a factor sqrt(10) apart around the default (default 7)."
    ),
    trials: int = typer.Option(None, min=1, max=10_000, help="Search with Optuna instead, so many trials."),
    space: list[str] = typer.Option(
        [], metavar="KEY=VALUES", help="With --trials: lr=1e-4..1e-2, r=4,8,16, METHOD.KEY=...; repeatable."
    ),
    protocol: str = typer.Option(
        None, help="Of the final runs: another one of the task (peftzoo show TASK)."
    ),
    preset: str = typer.Option(None, help="A published setting of the method (peftzoo show METHOD)."),
    set_: list[str] = output.SET,
    steps: int = typer.Option(None, min=1, help="Optimiser steps (default: the task's)."),
    batch_size: int = typer.Option(None, min=1, help="Rows per step (default: the task's)."),
    precision: str = typer.Option("auto", help="auto, fp32 or bf16."),
    hold_out: int = typer.Option(1000, min=2, help="Training rows for the loss, at most half of them."),
    limit: int = typer.Option(None, min=1, help="In the final runs score only the first rows."),
    data: str = typer.Option(None, help="Folder of a local data mirror (or PEFTZOO_DATA)."),
    source: str = typer.Option(None, help="embedded, mirror or hub."),
    out: Path = typer.Option(Path("runs"), help="Folder for records and trials."),
    workers: int = typer.Option(None, min=1, help="Runs at once (default: one per GPU, else per 4 cores)."),
    executor: str = sweeping.EXECUTOR,
    address: str = sweeping.ADDRESS,
    pack: str = typer.Option(
        None, metavar="N", help="Trials on one copy of the model: a number, auto (default on a GPU), or 16GB."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show what it will cost, and do nothing."),
    trust_task_code: bool = output.TRUST_TASK_CODE,
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Search each method's best values, then run the method with them.

    What decides is the loss on held-out training rows, never a score.
    """
    from peftzoo.contract.registry import methods
    from peftzoo.runs import quick_checks
    from peftzoo.tasks import task_files
    from peftzoo.units import parse_pack_size

    sweeping.check_executor(executor, address)
    output.load_plugins(plugin)
    names = output.parse_names(method, methods(), "method")
    quick_checks.check_methods(names)
    task_names = output.parse_names(task, task_files.tasks(), "task")
    quick_checks.check_tasks(task_names)
    tasks = task_files.expand(task_names)
    quick_checks.check_protocol(protocol, tasks)
    final_seeds, options = output.parse_seeds(seeds), output.parse_set(set_, names)
    train = {k: v for k, v in (("steps", steps), ("batch_size", batch_size)) if v is not None}
    quick_checks.check_model(model)
    quick_checks.check_data(model, source, data)
    quick_checks.check_training(train, precision)
    search = _search(lr_grid, trials, space, hold_out, names)
    if trials:
        quick_checks.check_installed("optuna")
    if pack:
        parse_pack_size("--pack", pack)
    from peftzoo.runs.plan import Request, resolve  # heavy: what is wrong above is told before
    from peftzoo.sweeps.dry_run import plan_rows

    pack_size = parse_pack_size("--pack", pack or _default_pack())
    requests = [
        Request(
            method=m, task=t, model=model, seed=final_seeds[0], options=options[m], train=train,
            preset=preset, protocol=protocol, precision=precision, source=source, data=data, limit=limit,
            trust_task_code=trust_task_code,
        )
        for t in tasks
        for m in names
    ]  # fmt: skip
    with redirect_stdout(sys.stderr):
        plans, notes = resolve(requests, skip="all" in (method, task) or len(tasks) > task.count(",") + 1)
        for note in notes:
            output.note(note)
        plans = _with_rate(plans, skip=method == "all")
        searches = sweeping.make_searches(search, [p.request for p in plans], final_seeds)
        if dry_run:
            rows, notes = plan_rows([], searches, out)
            for note in notes:
                output.note(note)
        else:
            output.make_folder(out)
            where = (executor, address)
            scheduler = sweeping.run_sweep([], searches, out, workers, where, plugin, pack_size)
    if dry_run:
        sweeping.print_plan(rows, json)
        return
    records = [record for record, _, _ in scheduler.records]
    if json:
        output.print_json([record.model_dump(mode="json") for record in records])
    else:
        print_tuned(records, out)
    if scheduler.lost_runs or any(record.status != "ok" for record in records):
        raise typer.Exit(1)


def _search(lr_grid: int | None, trials: int | None, space: list[str], rows: int, methods: list[str]) -> Any:
    """The search of these options. Raises `UserError` for options that do not go together."""
    from peftzoo.errors import UserError
    from peftzoo.sweeps.sweep_file import Search

    if lr_grid and trials:
        raise UserError(
            f"--lr-grid {lr_grid} and --trials {trials} are two kinds of search: keep one of them"
        )
    if space and not trials:
        raise UserError(f'--space "{space[0]}" is for --trials N: a grid has learning rates only')
    if not trials:
        return Search(lr_grid=lr_grid or 7, rows=rows)
    return Search(trials=trials, by="loss", rows=rows, space=dict(_space_entry(s, methods) for s in space))


def _space_entry(text: str, methods: list[str]) -> tuple[str, Any]:
    """Key and values of `--space`: `lr=1e-4..1e-2` is a range, `r=4,8` a list."""
    from peftzoo.errors import UserError, unknown
    from peftzoo.sweeps.sweep_file import SEARCHABLE_KEYS, Range

    key, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not key or not values:
        raise UserError(f'--space "{text}": write KEY=VALUES, for example --space r=4,8,16')
    if (owner := key.rpartition(".")[0]) and owner not in methods:
        raise unknown(f'method in --space "{text}"', owner, methods)
    name = key if key in SEARCHABLE_KEYS else f"set.{key}"
    low, dots, high = values.partition("..")
    if not dots:
        return name, [_value(v.strip()) for v in values.split(",")]
    ends = [_value(low), _value(high)]
    if not all(isinstance(v, (int, float)) for v in ends) or not ends[0] < ends[1]:
        raise UserError(f'--space "{text}": a range is two numbers, the lower first, such as 1e-4..1e-2')
    return name, Range(low=ends[0], high=ends[1], log=key.endswith("lr") and ends[0] > 0)


def _value(text: str) -> Any:
    """The text as an integer or a number where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _default_pack() -> str:
    """A GPU trains a pack faster, a CPU not."""
    import torch

    return "auto" if torch.cuda.is_available() else "1"


def _with_rate(plans: list[Any], skip: bool) -> list[Any]:
    """The plans of methods that train. Raises `UserError` for another one; with `skip` it is left out."""
    from peftzoo.errors import UserError
    from peftzoo.sweeps.lr_grid import has_rate

    for plan in plans:
        if not has_rate(plan) and not skip:
            raise UserError(
                f'method "{plan.request.method}" does not train with a learning rate, so there is nothing to '
                "tune: leave it out, and score it with peftzoo bench"
            )
    return [plan for plan in plans if has_rate(plan)]


COLUMNS = (
    "method", "default lr", "chosen", "held-out loss", "began at", "trials", "score", "+-95 %", "seeds",
    "note",
)  # fmt: skip
TEXT, OPTIONAL = ("method", "chosen", "note"), ("default lr", "trials", "began at", "seeds")


def print_tuned(records: list[Any], out: Path) -> None:
    """Print a row per method and task: the chosen values, their loss, and the score of the final runs."""
    by_task: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for r in records:
        by_task.setdefault((r.task, r.model), {}).setdefault(r.method, []).append(r)
    for (task, model), by_method in by_task.items():
        metrics = dict.fromkeys(r.result.metric for rs in by_method.values() for r in rs if r.result)
        output.print_table(
            f"{task} on {model}: {', '.join(metrics)} with values chosen by held-out loss",
            COLUMNS,
            [_row(same) for same in by_method.values()],
            right=[c for c in COLUMNS if c not in TEXT],
            optional=OPTIONAL,
        )
    for r in records:
        if r.status != "ok":
            print(f"{r.status}: {r.name} ({r.reason})")
    if records:
        output.next_step(f"peftzoo board {out}")


def _row(records: list[Any]) -> list[Any]:
    """The cells of a method, from its final runs."""
    from peftzoo.boards import ranks

    tuning = records[0].tuning or {}
    scored = [r for r in records if r.result and r.result.value is not None]
    mean, half = _run_tables._mean(scored, ranks) if scored else (None, None)
    chosen = {k.removeprefix("set."): _text(v) for k, v in tuning.get("chosen", {}).items()}
    notes = ["a seed breaks down"] if tuning.get("breakdowns") else []
    notes += ["on the edge of what was tried"] if tuning.get("at_edge") else []
    if default := tuning.get("default", {}).get("lr"):
        default = f"{default:g}"
    return [
        records[0].method, default, ", ".join(f"{k}={v}" for k, v in chosen.items()),
        output.format_number(tuning.get("loss"), 4), output.format_number(tuning.get("start_loss"), 4),
        tuning.get("used", {}).get("trials"), output.format_number(mean), output.format_number(half),
        len(scored), ", ".join(notes),
    ]  # fmt: skip


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
