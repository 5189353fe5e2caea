"""`peftzoo board`: tables and HTML pages of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo board --html site")(board)


def board(
    results: Path = typer.Argument(None, help="Folder of records (default: runs, else the published)."),
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

    A table per task, model, data source, protocol, budget and device; tuned runs beside their defaults.
    """
    for option, folder in (("--out", out), ("--html", html)):
        if folder is not None:
            output.make_folder(folder, option)
    if import_peft is None:
        results = output.results_folder(results)
    from peftzoo.adapters import write_atomically
    from peftzoo.boards import external_results, formats, pages, replications, tuning  # heavy
    from peftzoo.boards import tables as engine

    if import_peft is not None:
        _print_external(external_results.read_all(import_peft), out, json)
        return
    notes: list[str] = []
    records = _read_records(results, notes)
    tables = tuning.beside_default(engine.tables(records, baseline, notes.append))
    for note in notes:
        output.note(f"skipped: {note}")
    if json:
        output.print_json(formats.as_rows(tables))
        return
    papers = replications.rows(records)
    text = formats.markdown(tables, baseline, replications.markdown(papers))
    if out is not None:
        write_atomically(out / "board.md", text.encode())
        csv_files = formats.files(tables)
        for old in (out / "tables").glob("*.csv"):
            if old.name not in csv_files and formats.is_table(old):  # of an earlier board
                old.unlink()
        for name, lines in csv_files.items():
            write_atomically(out / "tables" / name, lines.encode())
        print(f"wrote {out / 'board.md'} and {len(csv_files)} tables in {out / 'tables'}")
    if html is not None:
        relative_notes = [n.replace(f"{results}/", "") for n in notes]  # no path of this machine
        count = pages.write(html, records, tables, papers, baseline, relative_notes)
        print(f"wrote {count} pages")
        output.next_step(f"open {html / 'index.html'}")
    elif out is not None:
        output.next_step("--html FOLDER makes pages of the same tables")
    if out is None and html is None:
        print(text)
        output.note("Next: --html FOLDER makes pages of these tables, --out FOLDER files")


def _read_records(results: Path, notes: list[str]) -> list[Any]:
    """The readable records of the folder; adds a note for each other file. Raises `UserError` without any."""
    from peftzoo.errors import UserError
    from peftzoo.records import store

    entries = [*store.read_all(results)]
    notes += [str(e) for e in entries if isinstance(e, UserError)]
    records = [e for e in entries if not isinstance(e, UserError)]
    if not records:
        for note in notes:
            output.note(f"skipped: {note}")
        raise UserError(
            f'no records under "{results}": make one with `peftzoo bench --method lora --task gsm8k`'
        )
    return records


def _print_external(entries: list[Any], out: Path | None, json: bool) -> None:
    """Print or write the results from elsewhere; an entry that is a `UserError` becomes a note."""
    from peftzoo.adapters import write_atomically
    from peftzoo.boards import external_results
    from peftzoo.errors import UserError

    for error in (e for e in entries if isinstance(e, UserError)):
        output.note(f"skipped: {error}")
    results = [e for e in entries if not isinstance(e, UserError)]
    if json:
        output.print_json([r.model_dump(mode="json") for r in results])
    elif out is None:
        print(external_results.markdown(results))
    else:
        write_atomically(out / "external.md", external_results.markdown(results).encode())
        print(f"wrote {out / 'external.md'}: {len(results)} results from elsewhere")
