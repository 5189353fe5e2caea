"""`peftzoo power`: how many seeds and rows it takes to tell methods apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo power --task sst2 --model minilm --difference 0.02")(power)


def power(
    task: str = typer.Option(None, "--task", "-t", help="A task on record."),
    model: str = typer.Option("embedded", help="The model, as the records name it."),
    difference: float = typer.Option(0.02, help="Of two methods' scores, that has to be found."),
    seed_deviation: float = typer.Option(
        None, help="Without records: standard deviation of a method's score over seeds."
    ),
    flips: float = typer.Option(0.125, help="Without records: share of answers that change with the seed."),
    method_flips: float = typer.Option(0.0, help="Without records: further share that the method changes."),
    rows: int = typer.Option(None, help="Scored rows (default: as on record)."),
    methods: int = typer.Option(None, help="Methods in the table (default: as on record, else 10)."),
    results: Path = typer.Option(None, help="Folder of records (default: runs, else the published)."),
    json: bool = output.JSON,
) -> None:
    """Say how many seeds it takes to find a difference.

    From records, or from given deviations. Found: significant at 5 % for the whole table, on 80 of 100 such
    tables.
    """
    from dataclasses import replace

    from peftzoo.errors import UserError

    if not 0 < difference < 1:
        raise UserError(f"--difference {difference:g}: above 0 and below 1, for example 0.02")
    if (task is None) == (seed_deviation is None):
        raise UserError("name --task for the deviations on record, or give --seed-deviation (and --rows)")
    folder = output.results_folder(results, "--results") if task else None
    records = output.read_records(folder) if task else []
    from peftzoo.boards import formats  # heavy: what is wrong above is told before
    from peftzoo.boards import power as engine

    if task is None:
        design = engine.of_deviations(seed_deviation, flips, rows or 1000, methods or 10, method_flips)
        designs: list[tuple[Any, Any]] = [(None, design)]
    else:
        try:
            found = engine.of_records(records, task, model)
        except UserError as error:
            raise UserError(f"{error}{_or_published(results, folder)}") from None
        designs = [
            (shared, replace(d, rows=rows or d.rows, methods=methods or d.methods)) for shared, d in found
        ]
    answers = [_answer(shared, design, difference) for shared, design in designs]
    if json:
        output.print_json(answers)
        return
    for (shared, design), answer in zip(designs, answers, strict=True):
        title = formats.title(shared) if shared else "Given deviations"
        facts = f"{answer['methods']} methods, {answer['rows']} rows; from {design.basis}"
        cells = [[a["seeds"], output.format_number(a["smallest"])] for a in answer["table"]]
        columns = ("seeds", "smallest difference found")
        output.print_table(f"{title}\n{facts}", columns, cells, right=columns)
        print(f"seed deviation of a method's true score: {answer['seed_deviation']:.4f}")
        print(_sentence(answer, difference))
    output.next_step(_next(answers[0], task, model))


def _or_published(named: Path | None, folder: Path) -> str:
    """Where else records are, for an error; nothing where a folder was named or they were read."""
    from peftzoo.records import store

    published = store.published_folder()
    return "" if named or not published or folder == published else f"; or --results {published}"


def _answer(shared: Any, design: Any, difference: float) -> dict[str, Any]:
    """What holds for one table, as JSON has it."""
    from peftzoo.boards import power as engine

    return {
        "name": shared["task"] if shared else "given", "status": "ok", "methods": design.methods,
        "rows": design.rows, "seed_deviation": design.parts.seed_deviation, "difference": difference,
        "seeds": design.seeds_for(difference), "basis": design.basis,
        "table": [{"seeds": k, "smallest": design.smallest(k, design.rows)} for k in engine.SEEDS],
    }  # fmt: skip


def _sentence(answer: dict[str, Any], difference: float) -> str:
    """The answer in words."""
    if answer["seeds"] is not None:
        return f"A difference of {difference:g} takes {answer['seeds']} seeds of each method."
    least = answer["table"][-1]
    return (
        f"A difference of {difference:g} is not found with {least['seeds']} seeds on {answer['rows']} rows: "
        f"that would find {least['smallest']:.3f}. It takes more rows."
    )


def _next(answer: dict[str, Any], task: str | None, model: str) -> str:
    """What to do with the answer."""
    if answer["seeds"] is None:
        return "--rows N says what more rows would find"
    last = min(answer["seeds"], 10) - 1
    return (
        f"peftzoo bench --method all --task {task or 'TASK'} --model {model} "
        f"--seeds {','.join(map(str, range(last + 1)))}"
    )
