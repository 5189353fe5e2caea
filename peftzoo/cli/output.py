"""What commands print: a table for a person, or one JSON document for a program."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

JSON = typer.Option(False, "--json", help="One JSON document on standard output, nothing else.")
SET = typer.Option(
    [],
    "--set",
    metavar="KEY=VALUE",
    help="Method option, or METHOD.KEY=VALUE for one of several; repeatable.",
)
PLUGIN = typer.Option([], "--plugin", metavar="FILE", help="Load a method from a file (runs its code).")


def as_json(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], right: Iterable[str] = ()
) -> None:
    """A table on standard output; numbers in the `right` columns are right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = list(columns)
    out = Table(
        title=Text(_plain(title), "bold"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for i, c in enumerate(columns):  # the first holds names, which are copied
        out.add_column(c, justify="right" if c in set(right) else "left", overflow="fold", no_wrap=i == 0)
    for row in rows:
        out.add_row(*(Text("" if cell is None else _plain(str(cell))) for cell in row))
    width = None if sys.stdout.isatty() else 160
    Console(width=width, highlight=False).print(out)


def note(text: str) -> None:
    """A line for the person at the terminal, on standard error."""
    print(_plain(text), file=sys.stderr)


def _plain(text: str) -> str:
    """Without characters that steer a terminal: the text may come from a file."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def count(n: int | None) -> str:
    return "" if n is None else f"{n:,}"


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def parse_set(pairs: list[str], chosen: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """Options per chosen method: `["r=4", "lora.r=8"]`, `["lora", "dora"]` -> `{"lora": {"r": "8"}, ...}`."""
    from peftzoo.errors import UserError, unknown

    found: dict[str, dict[str, str]] = {method: {} for method in chosen}
    own = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f'--set "{pair}": write KEY=VALUE, for example --set r=4')
        method, dot, option = key.strip().rpartition(".")
        if dot:
            own.append((method, option, value.strip()))
            continue
        for options in found.values():
            options[key.strip()] = value.strip()
    for method, option, value in own:  # after those for all
        if method not in found:
            raise unknown(f'method in --set "{method}.{option}={value}"', method, found)
        found[method][option] = value
    return found


def names(text: str, known: Iterable[str], what: str) -> list[str]:
    """A comma list; `all` means every known name."""
    from peftzoo.errors import UserError

    if text == "all":
        return sorted(known)
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise UserError(f"--{what} is empty: name one, several with commas, or all")
    return found


def folder(path: Path, option: str = "--out") -> None:
    """Make the folder that an option names. Raises `UserError` where nothing can be written there."""
    from peftzoo.errors import UserError

    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{option} "{path}": {error.strerror}') from None
    if not os.access(path, os.W_OK):
        raise UserError(f'{option} "{path}": it may not be written to; name another folder')


def load_plugins(files: list[str]) -> None:
    from peftzoo.contract import registry

    for file in files:
        registry.add_file(file)
