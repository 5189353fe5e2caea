"""`peftzoo recommend`: the best measured methods within a budget."""

from __future__ import annotations

from pathlib import Path

import typer

from peftzoo.cli import _run_tables, output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo recommend --model embedded --max-trainable 1M")(recommend)


def recommend(
    model: str = typer.Option(..., help="The model that will be tuned, as the records name it."),
    task_like: str = typer.Option(..., help="A task, a suite, or a word of a task's name or title."),
    max_trainable: str = typer.Option(None, help="Most trainable parameters, for example 1M."),
    max_train_memory: str = typer.Option(
        None, help="Most memory for training (computed total), for example 16GB."
    ),
    results: Path = typer.Option(None, help="Folder of records (default: runs, else the published)."),
    top: int = typer.Option(5, min=1, help="Rows of each table to show."),
    json: bool = output.JSON,
) -> None:
    """Name the measured methods that fit a budget.

    Best mean first, with what is missing; nothing is extrapolated.
    """
    from peftzoo.units import amount

    limits = [
        None if text is None else amount(option, text)
        for option, text in (("--max-trainable", max_trainable), ("--max-train-memory", max_train_memory))
    ]
    records = output.read_records(output.results_folder(results, "--results"))
    from peftzoo.boards import formats  # heavy: what is wrong above is told before
    from peftzoo.boards import recommend as engine

    advice = engine.recommend(records, model, task_like, *limits)
    if json:
        output.print_json({
            "tables": formats.as_rows(advice.tables), "beyond_budget": advice.over_budget,
            "unknown_cost": advice.unknown, "missing": [m.sentence() for m in advice.missing],
        })  # fmt: skip
        return
    columns = ("rank", "method", "score", "+-95 %", "seeds", "trained", "memory MiB", "step ms", "options")
    for facts, table in advice.tables:
        rows = [
            [interval, r["method"], output.format_number(r["score"]),
             output.format_number(_none_if_nan(r["ci95"])), r["seeds"],
             output.format_count(None if _none_if_nan(r["trained"]) is None else int(r["trained"])),
             output.format_number(_none_if_nan(r["memory_mib"]), 0),
             output.format_number(_none_if_nan(r["step_ms"]), 1),
             _run_tables.changed_options(r["records"][0])]
            for interval, r in zip(
                formats.rank_intervals(table.head(top)), table.head(top).to_dict("records"), strict=True)
        ]  # fmt: skip
        title = (
            f"{formats.title(facts)}: {facts['metric']}\n{formats.conditions(facts)}\n{formats.device(facts)}"
        )
        output.print_table(
            title, columns, rows, right=("rank", *columns[2:-1]), optional=("options", "step ms")
        )
    if not advice.tables:
        print("No measured row is within this budget.")
    print(f"Beyond the budget: {advice.over_budget} rows; cost not on record: {advice.unknown} rows.")
    for missing in advice.missing:
        print(f"Missing: {missing.sentence(most=3)}.")
    if advice.tables:
        facts, table = advice.tables[0]
        best = table.iloc[0]["method"]
        output.next_step(f"peftzoo show {best}; peftzoo bench --method {best},none --task {facts['task']}"
                         f" --model {model} --seeds 0,1,2,3,4")  # fmt: skip
    else:
        output.next_step("a larger budget, or peftzoo params --method all --model NAME to see what fits")


def _none_if_nan(value: float | None) -> float | None:
    """The value, or None for NaN."""
    return None if value is None or value != value else value
