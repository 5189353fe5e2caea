"""`peftzoo new-method`: write the template of a new method."""

from __future__ import annotations

from pathlib import Path

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("new-method", epilog="Example: peftzoo new-method my-method")(new_method)


def new_method(
    name: str = typer.Argument(..., help="Lower-case letters, digits, hyphens."),
    out: Path = typer.Option(Path("methods"), help="Folder for the file."),
    json: bool = output.JSON,
) -> None:
    """Write a plugin file that passes the checks, for you to edit."""
    from peftzoo.contract import registry
    from peftzoo.contract.scaffold import new_method as write

    path = write(name, out)
    if json:
        output.print_json({"name": name, "status": "ok", "file": str(path)})
    else:
        found = name in registry.methods()  # written into the folder of peftzoo's own methods
        print(f"wrote {path}" + (", where every command finds it" if found else ""))
        output.next_step(f"peftzoo check {name}" + ("" if found else f" --plugin {path}"))
