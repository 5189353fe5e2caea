"""`peftzoo export`: write an adapter in the format of another program."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

from peftzoo.cli import output

FORMATS = ("peft", "lora", "merged")


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo export my-adapter --to lora --rank 8 --out my-lora")(export)


def export(
    what: str = typer.Argument(
        ..., metavar="RUN_OR_DIR", help="An adapter folder, a record, its id or name."
    ),
    to: str = typer.Option(..., help="peft, lora (in PEFT's format) or merged (the whole model)."),
    out: Path = typer.Option(..., help="A new folder."),
    rank: int = typer.Option(None, min=1, help="lora: its rank (default: the smallest exact one)."),
    model: str = typer.Option(None, help="The model, where the adapter does not name it."),
    results: Path = typer.Option(None, help="Folder of the run (default: runs, else the published)."),
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Write an adapter for HF PEFT, as a plain LoRA, or merged.

    A plain LoRA is for servers; merged is the whole model, with the adapter in its weights.
    """
    from peftzoo.adapters import atomic
    from peftzoo.errors import UserError, unknown
    from peftzoo.records import saved_adapters, store
    from peftzoo.runs import quick_checks

    if to not in FORMATS:
        raise unknown("form", to, FORMATS)
    if rank is not None and to != "lora":
        raise UserError(f"--rank {rank}: only --to lora has a rank to choose")
    if to != "merged":
        quick_checks.check_installed("peft")
    quick_checks.check_model(model)
    atomic.assert_new(out)
    folder = saved_adapters.find(what, [results] if results else store.folders_with_records())
    output.load_plugins(plugin)
    from peftzoo.interop import export as engine  # heavy: what is wrong above is told before
    from peftzoo.interop import saved_runs

    with redirect_stdout(sys.stderr):
        output.note(f"adapter: {folder}")
        opened = saved_runs.load(folder, model)
        if to != "merged" and opened.card.get("prune"):
            raise UserError(
                "this run pruned its base, so its adapter fits no published model: use --to merged"
            )
        if to == "peft":
            report = engine.to_peft(opened.handle, out, opened.public_name)
        elif to == "lora":
            report = engine.to_lora(opened.handle, out, rank, opened.public_name)
        else:
            report = engine.to_merged(opened.handle, out, opened.loaded.tokenizer)
    mean, spread = (opened.card.get("target") or {"mean": 0, "spread": 1}).values()
    if (mean, spread) != (0, 1):
        output.note(f"the head predicts (value - {mean:g}) / {spread:g}, as it was trained")
    if json:
        output.print_json(report | {"folder": str(out)})
        return
    print(f"{report['method']} as {to}: {out}")
    if to == "lora":
        _print_errors(report)
    if to == "merged":
        output.next_step(f"peftzoo bench --method none --task gsm8k --model {out}")
    else:
        output.next_step(f'peft.PeftModel.from_pretrained(model, "{out}")')


def _print_errors(report: dict[str, Any]) -> None:
    """Print how close a LoRA export is to the adapter."""
    quality = "exact" if report["exact"] else f"the nearest; an exact one needs {report['needed_rank']}"
    print(f"rank {report['rank']}: {quality}")
    worst = f"{report['largest_error']:.2e}"
    print(f"relative error of the change: {report['error']:.2e}, in the worst layer {worst}")
