"""`peftzoo board`: tables and pages of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    app.command(epilog="Example: peftzoo board results --out results --html site")(board)


def board(
    results: Path = typer.Argument(Path("results"), help="Folder of records."),
    out: Path = typer.Option(
        None, help="Write board.md and a CSV file per table here, not to standard output."
    ),
    html: Path = typer.Option(None, help="Write static pages into this folder."),
    baseline: str = typer.Option("lora", help="The method that the others are tested against."),
    import_peft: Path = typer.Option(
        None, help="A board of its own for the result files of HF PEFT's method comparison in this folder."
    ),
    json: bool = output.JSON,
) -> None:
    """Rank what may be compared: Markdown, CSV, static pages.

    A table per task, model, data source, protocol, budget and device.
    """
    from peftzoo.adapters import write_atomically
    from peftzoo.boards import external_results, formats, pages, replications
    from peftzoo.boards import tables as engine

    for option, folder in (("--out", out), ("--html", html)):
        if folder is not None:
            output.folder(folder, option)
    if import_peft is not None:
        _external(external_results.read_all(import_peft), out, json)
        return
    notes: list[str] = []
    records = _records(results, notes)
    tables = engine.tables(records, baseline, notes.append)
    for note in notes:
        output.note(f"skipped: {note}")
    if json:
        output.as_json(formats.as_rows(tables))
        return
    papers = replications.rows(records)
    text = formats.markdown(tables, baseline, replications.markdown(papers))
    if out is not None:
        write_atomically(out / "board.md", text.encode())
        made = formats.files(tables)
        for old in (out / "tables").glob("*.csv"):
            if old.name not in made and formats.is_table(old):  # of an earlier board
                old.unlink()
        for name, lines in made.items():
            write_atomically(out / "tables" / name, lines.encode())
        print(f"wrote {out / 'board.md'} and {len(made)} tables in {out / 'tables'}")
    if html is not None:
        named = [n.replace(f"{results}/", "") for n in notes]  # no path of this machine
        count = pages.write(html, records, tables, papers, baseline, named)
        print(f"wrote {count} pages: {html / 'index.html'}")
    if out is None and html is None:
        print(text)


def _records(results: Path, notes: list[str]) -> list[Any]:
    from peftzoo.errors import UserError
    from peftzoo.records import store

    if not results.is_dir():
        raise UserError(f'results folder "{results}": no such folder')
    found = [*store.read_all(results)]
    notes += [str(f) for f in found if isinstance(f, UserError)]
    records = [f for f in found if not isinstance(f, UserError)]
    if not records:
        for note in notes:
            output.note(f"skipped: {note}")
        raise UserError(
            f'no records under "{results}": make one with `peftzoo bench --method lora --task gsm8k`'
        )
    return records


def _external(found: list[Any], out: Path | None, json: bool) -> None:
    from peftzoo.adapters import write_atomically
    from peftzoo.boards import external_results
    from peftzoo.errors import UserError

    for error in (f for f in found if isinstance(f, UserError)):
        output.note(f"skipped: {error}")
    results = [f for f in found if not isinstance(f, UserError)]
    if json:
        output.as_json([r.model_dump(mode="json") for r in results])
    elif out is None:
        print(external_results.markdown(results))
    else:
        write_atomically(out / "external.md", external_results.markdown(results).encode())
        print(f"wrote {out / 'external.md'}: {len(results)} results from elsewhere")
