"""`peftzoo sweep`: many runs, as a file lists them."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

from peftzoo.cli import bench, output


def add(app: typer.Typer) -> None:
    app.command(epilog="Example: peftzoo sweep sweep.yaml --dry-run")(sweep)


def sweep(
    file: Path = typer.Argument(..., help="YAML file: methods, tasks, models, seeds, set, train, search ..."),
    out: Path = typer.Option(Path("results"), help="Folder for records."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the plan, with estimates, and do nothing."),
    workers: int = typer.Option(None, min=1, help="Runs at once (default: one per GPU, else per 4 cores)."),
    executor: str = typer.Option("local", help="local, or ray."),
    address: str = typer.Option(None, help="A Ray cluster to join: auto, or its address (default: none)."),
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Do every run of a sweep. What is on record is not done again; what was interrupted goes on."""
    from peftzoo.errors import UserError, unknown
    from peftzoo.runs import packs
    from peftzoo.runs.plan import resolve
    from peftzoo.sweeps import sweep_file as engine

    if executor not in ("local", "ray"):
        raise unknown("executor", executor, ("local", "ray"))
    if address and executor != "ray":
        raise UserError(f'--address "{address}" is for --executor ray')
    output.load_plugins(plugin)
    wanted = engine.read(file)
    with redirect_stdout(sys.stderr):
        plans, notes = resolve(wanted.requests(), skip=wanted.gathers)
        for note in notes:
            output.note(note)
        studies = _studies(wanted, [p.request for p in plans])
        plans = [] if studies else plans
        if dry_run:
            rows = _plan(plans, studies, out)
        else:
            output.folder(out)
            size = packs.parse("pack", wanted.pack)
            scheduler = _do(
                [p.request for p in plans], studies, out, workers, (executor, address), plugin, size
            )
    if dry_run:
        _show_plan(rows, json)
    else:
        _report(scheduler, json)


def _studies(wanted: Any, requests: list[Any]) -> list[Any]:
    """A search for each method, task and model."""
    if not wanted.search:
        return []
    from peftzoo.sweeps.study import Study

    first = {(r.method, r.task, r.model): r for r in reversed(requests)}
    found = [Study(wanted.search, r, wanted.seeds) for r in reversed(first.values())]
    for study in found:
        study.check()
    return found


def _plan(plans: list[Any], studies: list[Any], out: Path) -> list[dict[str, Any]]:
    """A row per run; of a search, a row for its trials and one for the runs after it."""
    from peftzoo.errors import UserError
    from peftzoo.records import store
    from peftzoo.runs.estimates import Estimates
    from peftzoo.runs.plan import resolved
    from peftzoo.runs.run import new_record

    found = [*store.read_all(out)] if out.is_dir() else []
    for error in (f for f in found if isinstance(f, UserError)):
        output.note(f"skipped: {error}")
    estimates, rows = Estimates(r for r in found if not isinstance(r, UserError)), []

    def row(request: Any, kind: str, times: int, there: bool = False) -> dict[str, Any]:
        plan = resolved(request)
        record = new_record(plan)
        guess, c = estimates.of(record), record.train_config
        started = out / "checkpoints" / f"{record.id}-s{record.seed}.safetensors"
        there = there or (kind == "run" and store.path(out, record).is_file())
        state = "done" if there else "half done" if kind == "run" and started.is_file() else "to do"
        given = ", ".join(f"{k}={v}" for k, v in plan.request.options.items())
        return {
            "kind": kind, "times": times, "state": state, "method": record.method, "task": record.task,
            "model": record.model, "seed": record.seed, "steps": c["steps"], "batch_size": c["batch_size"],
            "lr": c["lr"], "options": given, "id": record.id if kind == "run" else None,
            "seconds": guess.seconds, "memory": guess.memory, "basis": guess.basis,
        }  # fmt: skip

    rows += [row(plan, "run", 1) for plan in plans]
    for study in studies:
        done, left = study.replay(out / "tuning")
        rows += [row(study.sample(), "trial", done, there=True)] if done else []
        if left:
            rows.append(row(study.sample(), "trial", left))
            rows.append(row(study.request, "after the search", len(study.seeds)))
        else:
            rows += [row(request, "run", 1) for request in study.settled()]
    return rows


def _show_plan(plan: list[dict[str, Any]], json: bool) -> None:
    ahead = [r for r in plan if r["state"] != "done"]
    known = [r for r in ahead if r["seconds"] is not None]
    memory = [r["memory"] for r in ahead if r["memory"] is not None]
    total = {
        "runs": sum(r["times"] for r in plan), "done": sum(r["times"] for r in plan if r["state"] == "done"),
        "to_do": sum(r["times"] for r in ahead), "estimated": sum(r["times"] for r in known),
        "seconds": sum(r["seconds"] * r["times"] for r in known), "memory": max(memory, default=None),
    }  # fmt: skip
    if json:
        output.as_json({"plan": plan, "total": total})
        return
    columns = ("method", "task", "model", "seed", "runs", "state", "steps", "batch", "lr", "options", "time",
               "memory", "estimate")  # fmt: skip
    rows = [
        [r["method"], r["task"], r["model"], "" if r["times"] > 1 else r["seed"],
         f"{r['times']} {'trials' if r['kind'] == 'trial' else ''}".strip(), r["state"], r["steps"],
         r["batch_size"], f"{r['lr']:g}" if r["steps"] else "", r["options"], _time(r["seconds"]),
         _mib(r["memory"]), r["basis"]]
        for r in plan
    ]  # fmt: skip
    output.table("Plan", columns, rows, right=("seed", "steps", "batch", "lr", "time", "memory"))
    missing = total["to_do"] - total["estimated"]
    words = [f"{total['runs']} runs, {total['done']} done, {total['to_do']} to do"]
    if known:
        words.append(f"{_time(total['seconds'])} one after the other for {total['estimated']} of them")
        words.append(f"at most {_mib(total['memory'])} for one run")
    if missing:
        words.append(f"time and memory of {missing} unknown")
    print("; ".join(words))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _mib(memory: int | None) -> str:
    return "unknown" if memory is None else f"{memory / 2**20:,.0f} MiB"


def _do(requests: list[Any], studies: list[Any], out: Path, workers: int | None,
        where: tuple[str, str | None], plugins: list[str], pack: tuple[Any, Any]) -> Any:  # fmt: skip
    from peftzoo.sweeps.scheduler import Scheduler

    out, files = out.resolve(), [str(Path(p).resolve()) for p in plugins]
    total = len(requests) + sum(s.search.trials * bool(s.space) + len(s.seeds) for s in studies)
    with _Shown(total) as shown:
        executor = _executor(where, workers, out, files, shown)
        drive = Scheduler(executor, out, shown.tell, shown.note)
        shown.note(f"{shown.total} runs, {executor.count} at once, {executor.threads} threads each")
        try:
            drive.do(requests, studies, pack)
        except KeyboardInterrupt:
            shown.note(f"stopping; {len(drive.waiting)} runs are not done, those under way have checkpoints")
            raise
        finally:
            executor.close()
    return drive


def _executor(where: tuple[str, str | None], workers: int | None, out: Path, plugins: list[str],
              shown: _Shown) -> Any:  # fmt: skip
    if where[0] == "ray":
        from peftzoo.sweeps.ray_executor import RayExecutor

        return RayExecutor(where[1], workers, out, plugins)
    from peftzoo.sweeps.executors import ProcessExecutor

    return ProcessExecutor(workers, plugins, shown.follow)


class _Shown:
    """The sweep as a whole and what each worker does, on a terminal; a line per finished run everywhere."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.total, self.done, self.lines = total, 0, {}
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[values]}", markup=False), TimeElapsedColumn(), console=self.console,
            disable=not self.console.is_terminal,
        )  # fmt: skip
        self.whole = self.bar.add_task("sweep", total=total, values="")

    def __enter__(self) -> _Shown:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)

    def follow(
        self, worker: int, job: Any, stage: str, step: int, total: int, values: dict[str, float]
    ) -> None:
        if worker not in self.lines:
            self.lines[worker] = self.bar.add_task("", total=1, values="")
        r, words = job.request, {"load": "loading", "train": "training", "score": "scoring"}[stage]
        title = f"{r.method} on {r.task}, seed {r.seed}"
        if job.companions:
            title = f"{len(job.requests)} runs on {r.task}"
        self.bar.update(
            self.lines[worker], completed=step, total=total,
            description=f"{title}: {words}",
            values=f"loss {values['loss']:.3f}" if "loss" in values else "",
        )  # fmt: skip

    def tell(self, record: Any, new: bool, trial: bool) -> None:
        self.done += 1
        self.total = max(self.total, self.done)
        self.bar.update(self.whole, completed=self.done, total=self.total)
        what = f"{record.method} on {record.task}, {record.model}, seed {record.seed}"
        what += ", a trial" if trial else ""
        word = record.status if new else "on record"
        self.note(f"[{self.done}/{self.total}] {what}: {word}, {bench.short(record)}")

    def note(self, text: str) -> None:
        if self.bar.disable:
            output.note(text)
        else:
            self.bar.console.print(text, markup=False, highlight=False)


def _report(drive: Any, json: bool) -> None:
    bench.report(drive.records, json, {})
    for text in drive.lost:
        output.note(f"lost: {text}")
    if drive.lost or any(record.status != "ok" for record, _, _ in drive.records):
        raise typer.Exit(1)
