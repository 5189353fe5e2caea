"""`peftzoo import`: convert an adapter of HF PEFT to our format."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("import", epilog="Example: peftzoo import a-peft-folder --out my-adapter")(import_)


def import_(
    folder: Path = typer.Argument(..., metavar="DIR", help="A folder that HF PEFT saved."),
    out: Path = typer.Option(..., help="A new folder for the adapter in our format."),
    model: str = typer.Option(None, help="The model, where the adapter does not name it."),
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Read an adapter of HF PEFT.

    As our method where that computes the same, else as hf:TYPE.
    """
    from peftzoo.adapters import atomic
    from peftzoo.runs import quick_checks

    atomic.assert_folder(folder, "a PEFT adapter")
    atomic.assert_new(out)
    quick_checks.check_model(model)
    output.load_plugins(plugin)
    from peftzoo.adapters import saving  # heavy: what is wrong above is told before
    from peftzoo.interop import peft_import, saved_runs

    with redirect_stdout(sys.stderr):
        peft_adapter = peft_import.read(folder)
        loaded = saved_runs.load_model(peft_adapter, model)
        handle, report = peft_import.import_adapter(peft_adapter, loaded.model)
        size = saving.save(handle, out, model=loaded.name, imported=report)
    if json:
        output.print_json(report | {"folder": str(out), "bytes": size, "model": loaded.name})
        return
    print(f"{report['peft_type']} of HF PEFT read as {report['method']}: {out} ({size:,} bytes)")
    if report["ignored"]:
        print(f"not read, unknown to this version of HF PEFT: {', '.join(report['ignored'])}")
    output.next_step(f'peftzoo.load(model, "{out}")')
