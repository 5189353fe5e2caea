"""What the commands share: options, printing of tables and JSON, and parsing of option values."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
TRUST_TASK_CODE = typer.Option(
    False, "--trust-task-code", help="Allow metrics of the library evaluate, which are code of the Hub."
)
PLUGIN = typer.Option([], "--plugin", metavar="FILE", help="Load a method from a file (runs its code).")


ACTIVITIES = {
    "wait": "waiting for another program that does this run", "load": "loading", "train": "training",
    "score": "scoring",
}  # fmt: skip
"""The stages of a run (`runner.Progress`) in words."""


def print_json(document: Any) -> None:
    """Print one JSON document on standard output. Raises `ValueError` for NaN and infinity."""
    print(json.dumps(document, indent=1, allow_nan=False))


def print_table(
    title: str,
    columns: Iterable[str],
    rows: Iterable[Iterable[Any]],
    right: Iterable[str] = (),
    optional: Sequence[str] = (),
) -> None:
    """Print a table on standard output; the columns named in `right` hold numbers.

    On a terminal text is wrapped to its width, numbers and the first column never; where these alone are too
    wide, the columns in `optional` are left out, the last one first, and named below; where that is not
    enough, each row is a list of its cells. In a pipe a row is a line, aligned with spaces, without rules.
    """
    names = list(columns)
    cells = [["" if c is None else _printable(str(c)) for c in row] for row in rows]
    numbers = set(right)
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    if not sys.stdout.isatty():
        print(_printable(title), _line(names, names, widths, numbers), sep="\n")
        for row in cells:
            print(_line([c.replace("\n", " ") for c in row], names, widths, numbers))
        print()
        return
    from rich.console import Console

    size = shutil.get_terminal_size()
    console = Console(highlight=False, width=size.columns, height=size.lines)
    width_of = dict(zip(names, widths, strict=True))
    left_out: list[str] = []
    while not _fits(shown := [n for n in names if n not in left_out], width_of, numbers, console.width):
        remaining = [n for n in optional if n in shown]
        if not remaining:
            _print_lists(console, title, names, cells)
            return
        left_out.append(remaining[-1])
    kept = [i for i, name in enumerate(names) if name in shown]
    console.print(_rich_table(title, shown, [[row[i] for i in kept] for row in cells], width_of, numbers))
    if left_out:
        print(f"Not shown at this width: {'; '.join(reversed(left_out))} (--json has all).")
    print()


LEAST_TEXT, GAP = 12, 2
"""Characters that a text column needs at least, and between two columns."""


def _least_width(name: str, first: str, width: int, numbers: set[str]) -> int:
    """Characters that a column needs at least: all of a number and of the first column."""
    return width if name == first or name in numbers else min(width, LEAST_TEXT)


def _fits(names: list[str], width_of: dict[str, int], numbers: set[str], columns: int) -> bool:
    """Whether these columns can stand beside each other."""
    least = sum(_least_width(n, names[0], width_of[n], numbers) for n in names)
    return least + GAP * (len(names) - 1) <= columns


def _line(row: list[str], names: list[str], widths: list[int], numbers: set[str]) -> str:
    """The cells aligned with spaces."""
    aligned = [c.rjust(w) if n in numbers else c.ljust(w) for n, c, w in zip(names, row, widths, strict=True)]
    return (" " * GAP).join(aligned).rstrip()


def _rich_table(
    title: str, names: list[str], cells: list[list[str]], width_of: dict[str, int], numbers: set[str]
) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heading = Text(_printable(title), "bold")
    table = Table(
        title=heading, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False, padding=(0, GAP - 1, 0, 0)
    )
    for i, name in enumerate(names):
        whole = i == 0 or name in numbers
        least = _least_width(name, names[0], width_of[name], numbers)
        side = "right" if name in numbers else "left"
        table.add_column(name, justify=side, overflow="fold", no_wrap=whole, min_width=least)
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _print_lists(console: Any, title: str, names: list[str], cells: list[list[str]]) -> None:
    """Each row as a list of its cells that are not empty."""
    from rich.text import Text

    console.print(Text(_printable(title), "bold"))
    for row in cells:
        console.print(Text(row[0], "bold"), soft_wrap=True)
        for name, cell in zip(names[1:], row[1:], strict=True):
            if cell:
                console.print(Text(f"  {name}: {cell}"), overflow="fold")


def quiet() -> bool:
    """Whether `--quiet` was given: no progress, notes and next steps, only results and errors."""
    return _quiet


def set_quiet(value: bool) -> None:
    """Turn `--quiet` on or off for the commands of this process."""
    global _quiet
    _quiet = value


_quiet = False


def note(text: str) -> None:
    """Print a message for the user on standard error; nothing with `--quiet`."""
    if not _quiet:
        print(_printable(text), file=sys.stderr)


def next_step(text: str) -> None:
    """Print on standard output what to do next; nothing with `--quiet`."""
    if not _quiet:
        print(f"Next: {_printable(text)}")


def progress_bar(*columns: Any) -> Any:
    """A rich progress bar on standard error; disabled where that is no terminal, and with `--quiet`.

    `columns` stand between the bar and the times; the elapsed time comes last.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bar = [BarColumn(bar_width=24)] if console.width >= WIDE_ENOUGH_FOR_BARS else []
    return Progress(
        TextColumn("{task.description}", markup=False), *bar, MofNCompleteColumn(), *columns,
        TimeElapsedColumn(), console=console, disable=_quiet or not console.is_terminal,
    )  # fmt: skip


class LogLines:
    """The progress of one run in a log file: a line per stage, and one every `LOG_SECONDS` seconds."""

    def __init__(self, title: str) -> None:
        self.title, self.stage, self.told = title, "", 0.0

    def __call__(self, stage: str, step: int, total: int, values: dict[str, float]) -> None:
        """Print a line if it is time for one; a `runner.Progress`."""
        now = time.monotonic()
        if stage == self.stage and now - self.told < LOG_SECONDS:
            return
        self.stage, self.told = stage, now
        loss = f", loss {values['loss']:.3f}" if "loss" in values else ""
        note(f"{self.title}: {ACTIVITIES[stage]}" + (f", {step} of {total}" if total > 1 else "") + loss)


WIDE_ENOUGH_FOR_BARS, LOG_SECONDS = 110, 30
"""Columns of a terminal from which there is room for a bar; seconds between lines of a log file."""


@contextmanager
def status_line(text: str) -> Iterator[Callable[[str], None]]:
    """A line on standard error that a long command changes by calling the function; none with `--quiet`."""
    from rich.console import Console

    with Console(stderr=True, quiet=_quiet).status(text) as status:
        yield status.update


def _printable(text: str) -> str:
    """The text without control characters of a terminal: it may come from a file."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def format_count(n: int | None) -> str:
    """`1,234,567`, or "" for None."""
    return "" if n is None else f"{n:,}"


def format_number(value: float | None, digits: int = 3) -> str:
    """The number with so many decimals, or "" for None."""
    return "" if value is None else f"{value:.{digits}f}"


def parse_set(pairs: list[str], chosen: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """Options per chosen method: `["r=4", "lora.r=8"]`, `["lora", "dora"]` -> `{"lora": {"r": "8"}, ...}`.

    Raises `UserError` for a pair without `=`, or one for a method that is not chosen.
    """
    from peftzoo.errors import UserError, unknown

    options: dict[str, dict[str, str]] = {method: {} for method in chosen}
    for_one = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f'--set "{pair}": write KEY=VALUE, for example --set r=4')
        method, dot, option = key.strip().rpartition(".")
        if dot:
            for_one.append((method, option, value.strip()))
            continue
        for own_options in options.values():
            own_options[key.strip()] = value.strip()
    for method, option, value in for_one:  # they override those for all
        if method not in options:
            raise unknown(f'method in --set "{method}.{option}={value}"', method, options)
        options[method][option] = value
    return options


def parse_names(text: str, known: Iterable[str], what: str) -> list[str]:
    """The names of a comma-separated list, each once; `all` means every known name.

    Raises `UserError`, which names the option `--WHAT`, for an empty list; names are not checked.
    """
    from peftzoo.errors import UserError

    if text == "all":
        return sorted(known)
    chosen = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not chosen:
        raise UserError(f"--{what} is empty: name one, several with commas, or all")
    return chosen


def parse_seeds(text: str) -> list[int]:
    """The seeds of `--seeds`, each once. Raises `UserError` for what is no list of whole numbers from 0."""
    from peftzoo.errors import UserError

    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f'--seeds "{text}": whole numbers with commas, for example 0,1,2') from None
    if any(not 0 <= s < 2**31 for s in seeds):
        raise UserError(f'--seeds "{text}": each from 0 to {2**31 - 1}')
    return list(dict.fromkeys(seeds))


def make_folder(path: Path, option: str = "--out") -> None:
    """Make the folder that an option names. Raises `UserError` if it cannot be made or written to."""
    from peftzoo.errors import UserError

    if path.exists() and not path.is_dir():
        raise UserError(f'{option} "{path}" is a file: name a folder')
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{option} "{path}" cannot be made ({error.strerror}): name another folder') from None
    if not os.access(path, os.W_OK):
        raise UserError(f'{option} "{path}": it may not be written to; name another folder')


def results_folder(named: Path | None, option: str = "results") -> Path:
    """The folder of records to read: the one that was named, else the first that has some, which is said.

    Raises `UserError` for one that does not exist, and where there are no records at all.
    """
    from peftzoo.errors import UserError
    from peftzoo.records import store

    if named is not None:
        if not named.is_dir():
            raise UserError(f'{option} "{named}": no such folder')
        return named
    found = store.folders_with_records()
    if not found:
        raise UserError("no records here: make one with `peftzoo bench --method lora --task gsm8k`")
    folder, published = found[0], store.published_folder()
    count = f"{sum(1 for _ in (folder / store.FOLDERS['ok']).rglob('*.json')):,}"
    if folder == published:
        note(f"reading the published records: {count} in {folder}")
    else:
        others = f" (the published ones are in {published})" if published in found[1:] else ""
        note(f"reading the records in {folder}: {count}{others}")
    return folder


def read_records(folder: Path) -> list[Any]:
    """The readable records of the folder; other files are named in a note. Raises `UserError` without any."""
    from peftzoo.errors import UserError
    from peftzoo.records import store

    records = []
    for entry in store.read_all(folder):
        if isinstance(entry, UserError):
            note(f"skipped: {entry}")
        else:
            records.append(entry)
    if not records:
        raise UserError(
            f'no records under "{folder}": make one with `peftzoo bench --method lora --task gsm8k`'
        )
    return records


def load_plugins(files: list[str]) -> None:
    """Register the methods of these plugin files, which runs their code."""
    from peftzoo.contract import registry

    for file in files:
        registry.add_file(file)
