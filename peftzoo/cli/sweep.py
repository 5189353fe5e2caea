"""`peftzoo sweep`: do the runs that a sweep file lists."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from peftzoo.cli import _run_tables, output

EXECUTOR = typer.Option("local", help="local, or ray.")
ADDRESS = typer.Option(None, help="A Ray cluster to join: auto, or its address (default: none).")


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo sweep sweep.yaml --dry-run")(sweep)


def sweep(
    file: Path = typer.Argument(..., help="YAML file: methods, tasks, models, seeds, set, train, search ..."),
    out: Path = typer.Option(Path("runs"), help="Folder for records."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the plan, with estimates, and do nothing."),
    workers: int = typer.Option(None, min=1, help="Runs at once (default: one per GPU, else per 4 cores)."),
    executor: str = EXECUTOR,
    address: str = ADDRESS,
    trust_task_code: bool = output.TRUST_TASK_CODE,
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Do every run of a sweep. What is on record is not done again; what was interrupted goes on."""
    from peftzoo.sweeps import sweep_file as engine
    from peftzoo.units import parse_pack_size

    check_executor(executor, address)
    output.load_plugins(plugin)
    spec = engine.read(file)
    from peftzoo.runs.plan import resolve  # heavy: what is wrong above is told before
    from peftzoo.sweeps.dry_run import plan_rows

    with redirect_stdout(sys.stderr):
        requests = [replace(r, trust_task_code=trust_task_code) for r in spec.requests()]
        plans, notes = resolve(requests, skip=spec.selects_by_group)
        for note in notes:
            output.note(note)
        studies = make_searches(spec.search, [p.request for p in plans], spec.seeds)
        plans = [] if studies else plans
        if dry_run:
            rows, notes = plan_rows(plans, studies, out)
            for note in notes:
                output.note(note)
        else:
            output.make_folder(out)
            size = parse_pack_size("pack", spec.pack)
            scheduler = run_sweep(
                [p.request for p in plans], studies, out, workers, (executor, address), plugin, size
            )
    if dry_run:
        print_plan(rows, json)
    else:
        _print_results(scheduler, json)


def check_executor(executor: str, address: str | None) -> None:
    """Raise `UserError` for an executor that does not exist, is not installed or takes no address."""
    from peftzoo.errors import UserError, unknown
    from peftzoo.runs import quick_checks

    if executor not in ("local", "ray"):
        raise unknown("executor", executor, ("local", "ray"))
    if address and executor != "ray":
        raise UserError(f'--address "{address}" is for --executor ray')
    if executor == "ray":
        quick_checks.check_installed("ray")


def make_searches(search: Any, requests: list[Any], seeds: list[int]) -> list[Any]:
    """A search for each method, task and model (`searches.SearchRun`); [] without `search`."""
    if not search:
        return []
    from peftzoo.runs.plan import LookupCache
    from peftzoo.sweeps.lr_grid import LrGrid
    from peftzoo.sweeps.study import Study

    cache = LookupCache()
    first = {(r.method, r.task, r.model): r for r in reversed(requests)}
    studies = [
        LrGrid(search, r, seeds, cache) if search.lr_grid else Study(search, r, seeds)
        for r in reversed(first.values())
    ]
    for study in studies:
        study.check_space()
    return studies


def print_plan(plan: list[dict[str, Any]], json: bool) -> None:
    """Print the rows of a dry run and their totals."""
    to_do = [r for r in plan if r["state"] != "done"]
    estimated = [r for r in to_do if r["seconds"] is not None]
    memory = [r["memory"] for r in to_do if r["memory"] is not None]
    total = {
        "runs": sum(r["times"] for r in plan), "done": sum(r["times"] for r in plan if r["state"] == "done"),
        "to_do": sum(r["times"] for r in to_do), "estimated": sum(r["times"] for r in estimated),
        "seconds": sum(r["seconds"] * r["times"] for r in estimated), "memory": max(memory, default=None),
        "steps": sum(r["steps"] * r["times"] for r in to_do),
    }  # fmt: skip
    if json:
        output.print_json({"plan": plan, "total": total})
        return
    columns = ("method", "task", "model", "seed", "runs", "state", "steps", "batch", "lr", "options", "time",
               "memory", "estimate")  # fmt: skip
    rows = [
        [r["method"], r["task"], r["model"], "" if r["times"] > 1 else r["seed"],
         f"{r['times']} {'trials' if r['kind'] == 'trial' else ''}".strip(), r["state"], r["steps"],
         r["batch_size"], f"{r['lr']:g}" if r["steps"] else "", r["options"], _hours(r["seconds"]),
         _mib(r["memory"]), "" if r["seconds"] is None else r["basis"]]
        for r in plan
    ]  # fmt: skip
    empty = {i for i, name in enumerate(columns) if name in ESTIMATED and not any(row[i] for row in rows)}
    columns, *rows = ([c for i, c in enumerate(line) if i not in empty] for line in (columns, *rows))
    right, optional = (
        ("seed", "steps", "batch", "lr", "time", "memory"),
        ("model", "steps", "batch", "lr", "estimate"),
    )
    output.print_table("Plan", columns, rows, right=right, optional=optional)
    missing = total["to_do"] - total["estimated"]
    summary = [f"{total['runs']} runs, {total['done']} done, {total['to_do']} to do"]
    if any(r["kind"] == "trial" for r in plan):
        summary.append(f"{total['steps']:,} steps")
    if estimated:
        summary.append(f"{_hours(total['seconds'])} one after the other for {total['estimated']} of them")
        summary.append(f"at most {_mib(total['memory']) or 'unknown memory'} for one run")
    if missing:
        which = f" for {missing} of them" if estimated else ""
        summary.append(f"no like run on record{which}: time and memory are known after the first")
    print("; ".join(summary))
    output.next_step("the same command without --dry-run")


ESTIMATED = ("time", "memory", "estimate")
"""Columns of a plan that are left out where no run has an estimate."""


def _hours(seconds: float | None) -> str:
    """Seconds as `h:mm:ss`; "" for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _mib(size: int | None) -> str:
    """Bytes as MiB; "" for None."""
    return "" if size is None else f"{size / 2**20:,.0f} MiB"


def run_sweep(requests: list[Any], studies: list[Any], out: Path, workers: int | None,
        where: tuple[str, str | None], plugins: list[str], pack: tuple[Any, Any]) -> Any:  # fmt: skip
    """Do the runs and searches; returns the scheduler with their records. `where`: (executor, address)."""
    from peftzoo.sweeps.scheduler import Scheduler

    out, files = out.resolve(), [str(Path(p).resolve()) for p in plugins]
    for study in studies:
        study.begin(out)
    with SweepProgress(len(requests), studies) as progress:
        executor = _executor(where, workers, out, files, progress)
        scheduler = Scheduler(executor, out, progress.on_record, progress.note)
        text = f"{progress.total} runs, {executor.count} at once, {executor.threads} threads each"
        known = sum(s.spent["trials"] for s in studies)
        progress.note(text + (f"; {known} trials are on record" if known else ""))
        try:
            scheduler.run(requests, studies, pack)
        except KeyboardInterrupt:
            unfinished = len(scheduler.pending)
            progress.note(f"stopping; {unfinished} runs are not done, those under way have checkpoints")
            raise
        finally:
            executor.close()
    return scheduler


def _executor(where: tuple[str, str | None], workers: int | None, out: Path, plugins: list[str],
              progress: SweepProgress) -> Any:  # fmt: skip
    """The executor of `where`, (name, address of a Ray cluster)."""
    if where[0] == "ray":
        from peftzoo.sweeps.ray_executor import RayExecutor

        return RayExecutor(where[1], workers, out, plugins)
    from peftzoo.sweeps.process_executor import ProcessExecutor

    return ProcessExecutor(workers, plugins, progress.on_progress)


class SweepProgress:
    """Prints the progress: a line per finished run; on a terminal also bars for the sweep and each worker.

    `requests`: the number of runs beside those of the searches `studies`.
    """

    def __init__(self, requests: int, studies: list[Any]) -> None:
        from rich.progress import TextColumn

        self.runs, self.studies = requests + sum(len(s.seeds) for s in studies), studies
        self.done, self.trials, self.lines = 0, 0, {}
        self.started, self.new_steps = time.monotonic(), 0
        total = self.total
        self.bar = output.progress_bar(TextColumn("{task.fields[values]}", markup=False))
        self.sweep_bar = self.bar.add_task("sweep", total=total, values="")

    def __enter__(self) -> SweepProgress:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)

    @property
    def total(self) -> int:
        """Runs and trials, done and still expected."""
        return max(self.done, self.runs + self.trials + sum(s.left()[0] for s in self.studies))

    def time_left(self) -> str:
        """What is left of the searches, by the time per step so far; "" where that is not known."""
        runs_left = self.runs + self.trials - self.done
        steps = sum(s.left()[1] for s in self.studies)
        steps += runs_left * max((s.steps for s in self.studies), default=0)
        if not self.studies or not self.new_steps or not steps:
            return ""
        return f"about {_hours((time.monotonic() - self.started) / self.new_steps * steps)} left"

    def on_progress(
        self, worker: int, job: Any, stage: str, step: int, total: int, values: dict[str, float]
    ) -> None:
        """Update the bar of a worker; `executor.ProgressCallback`."""
        if worker not in self.lines:
            self.lines[worker] = self.bar.add_task("", total=1, values="")
        r, activity = job.request, output.ACTIVITIES[stage]
        title = f"{r.method} on {r.task}, seed {r.seed}"
        if job.companions:
            title = f"{len(job.requests)} runs on {r.task}"
        self.bar.update(
            self.lines[worker], completed=step, total=total,
            description=f"{title}: {activity}",
            values=f"loss {values['loss']:.3f}" if "loss" in values else "",
        )  # fmt: skip

    def on_record(self, record: Any, new: bool, trial: bool) -> None:
        """Print the line of a finished run."""
        self.done += 1
        self.trials += trial
        self.new_steps += (record.train_config.get("steps") or 0) * new
        left = self.time_left()
        self.bar.update(self.sweep_bar, completed=self.done, total=self.total, values=left)
        title = f"{record.method} on {record.task}, {record.model}, seed {record.seed}"
        title += f", {changed}" if (changed := _run_tables.changed_options(record)) else ""
        title += ", a trial" if trial else ""
        status = record.status if new else "on record"
        text = f"{title}: {status}, {_run_tables.score_or_reason(record)}" + (f"; {left}" if left else "")
        self.note(f"[{self.done}/{self.total}] {text}")

    def note(self, text: str) -> None:
        """Print a message above the bars."""
        if self.bar.disable:
            output.note(text)
        else:
            self.bar.console.print(text, markup=False, highlight=False)


def _print_results(scheduler: Any, json: bool) -> None:
    """Print the records of the sweep; exit with code 1 if a run failed."""
    results = sorted(
        scheduler.records, key=lambda r: (r[0].task, r[0].model, r[0].method, r[0].id, r[0].seed)
    )
    _run_tables.print_results(results, json, {})
    for text in scheduler.lost_runs:
        output.note(f"lost: {text}")
    if scheduler.lost_runs or any(record.status != "ok" for record, _, _ in scheduler.records):
        raise typer.Exit(1)
