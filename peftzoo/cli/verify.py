"""`peftzoo verify`: check a record, and do its run again."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo verify unilora/gsm8k/embedded/s0")(verify)


def verify(
    record: str = typer.Argument(..., help="The file of a record, or a run's name or id."),
    tolerance: float = typer.Option(0.02, min=0, help="Largest difference of scores that is none."),
    run: bool = typer.Option(True, help="Do the run again; else only the files are checked."),
    task: str = typer.Option(None, help="The task's file, for a task that is not built in."),
    model: str = typer.Option(None, help="The model's folder, for a model that has no name."),
    data: str = typer.Option(None, help="Folder of the local mirror, for runs on it."),
    trust_remote_code: bool = typer.Option(False, help="Allow code that comes with a model."),
    trust_task_code: bool = output.TRUST_TASK_CODE,
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Check a record and do its run again.

    Checksums, outcomes per row, score and counts are compared.
    An edited record is refused. The same device and versions give the same score; others round otherwise.
    """
    from peftzoo.errors import UserError
    from peftzoo.records import store
    from peftzoo.runs import quick_checks
    from peftzoo.runs import verification as engine

    output.load_plugins(plugin)
    quick_checks.check_tasks(filter(None, [task]))
    quick_checks.check_model(model)
    if data is not None:
        quick_checks.check_data(model or "", "mirror", data)
    verified = store.find(record, store.folders_with_records())
    published = store.published_folder()
    whose = "record" if published is None or published not in verified.file.parents else "published record"
    output.note(f"{whose}: {verified.file}")
    if verified.status != "ok":
        raise UserError(
            f"{record}: a {verified.status} run has no result to verify: choose one under records/"
        )
    checks = engine.check_files(verified)
    if run:
        request = engine.request_of(
            verified,
            task=task,
            model=model,
            data=data,
            trust_remote_code=trust_remote_code,
            trust_task_code=trust_task_code,
        )
        output.note(f"running {verified.name} again")
        with redirect_stdout(sys.stderr):
            checks += engine.rerun(verified, request, tolerance)
    holds = all(c.good is not False for c in checks)
    if json:
        status = "ok" if holds else "differs"
        output.print_json({"name": verified.name, "status": status, "checks": [asdict(c) for c in checks]})
    else:
        verdicts = {True: "same", False: "DIFFERS", None: "not compared"}
        output.print_table(verified.name, ("what", "recorded", "found", ""),
                   [(c.what, c.recorded, c.found, verdicts[c.good]) for c in checks])  # fmt: skip
        print("The record holds." if holds else "The record does not hold: see the lines that differ.")
        output.next_step("peftzoo board" if holds else f"peftzoo doctor, and compare with {verified.file}")
    if not holds:
        raise typer.Exit(1)
