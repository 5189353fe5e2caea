"""`peftzoo generate`: train a method that generates weights from task descriptions; measure what it saves."""

from __future__ import annotations

import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

from peftzoo.adapters import write_atomically
from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo generate --method lora-gen --tasks gsm8k,sst2 --unseen stsb")(
        generate
    )


def generate(
    method: str = typer.Option(..., "--method", "-m", help="A method that reads descriptions."),
    tasks: str = typer.Option(..., "--tasks", "-t", help="Tasks to train on, with commas."),
    unseen: str = typer.Option("", help="Tasks described only after training, with commas."),
    model: str = typer.Option("embedded", help="embedded, an alias, a Hub id or a folder."),
    shots: int = typer.Option(2, min=0, help="Worked examples in a description."),
    seed: int = typer.Option(0, min=0, help="Seed."),
    set_: list[str] = output.SET,
    steps: int = typer.Option(None, help="Optimiser steps (default: the tasks' together)."),
    batch_size: int = typer.Option(None, help="Rows per step, all of one task."),
    lr: float = typer.Option(None, help="Learning rate (default: the method's)."),
    precision: str = typer.Option("auto", help="auto, fp32 or bf16."),
    limit: int = typer.Option(None, min=1, help="Score only the first rows."),
    data: str = typer.Option(None, help="Folder of a local data mirror (or PEFTZOO_DATA)."),
    source: str = typer.Option(None, help="embedded, mirror or hub."),
    out: Path = typer.Option(Path("runs/generate"), help="Folder for generator and gain.json."),
    page: Path = typer.Option(None, help="Write the table here too, as Markdown."),
    trust_task_code: bool = output.TRUST_TASK_CODE,
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Train one generator of weights on several tasks, and compare.

    Compared are a description in the context and in the weights: each description is read once, its weights
    are merged, and the model runs without it.
    """
    from peftzoo.errors import UserError
    from peftzoo.runs import quick_checks
    from peftzoo.tasks import task_files

    output.load_plugins(plugin)
    known, train = task_files.tasks(), {"steps": steps, "batch_size": batch_size, "lr": lr}
    trained_on = output.parse_names(tasks, known, "tasks")
    described_only = output.parse_names(unseen, known, "unseen") if unseen else []
    options = output.parse_set(set_, [method])[method]
    quick_checks.check_methods([method])
    quick_checks.check_tasks([*trained_on, *described_only])
    quick_checks.check_model(model)
    quick_checks.check_data(model, source, data)
    quick_checks.check_training(train, precision)
    for name, folder in (("out", out), ("page", page.parent if page else out)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'--{name} "{folder}": {error.strerror}') from None
    from peftzoo.runs import adapter_generation as engine  # heavy: what is wrong above is told before

    request = engine.Request(
        method=method, model=model, seed=seed, shots=shots, options=options,
        tasks=tuple(task_files.expand(trained_on)), unseen=tuple(task_files.expand(described_only)),
        train=train, precision=precision, limit=limit, data=data, source=source,
        trust_task_code=trust_task_code,
    )  # fmt: skip
    with redirect_stdout(sys.stderr), output.status_line("loading") as status:
        report = engine.run(request, out, lambda stage, done, total: status(f"{stage} ({done} of {total})"))
    if page:
        write_atomically(page, _markdown(report).encode())
    if json:
        output.print_json(report)
        return
    title = f"{request.method} on {report['model']}: in context -> in weights"
    output.print_table(
        title, COLUMNS, [_row(t) for t in report["tasks"]], right=COLUMNS[3:], optional=OPTIONAL
    )
    print(f"The numbers: {out / 'gain.json'}")
    output.next_step(f'peftzoo.load(model, "{out / "generator"}", tokenizer=tokenizer)')


COLUMNS = (
    "task", "seen", "metric", "rows", "base", "base, told", "written", "prompt tokens", "first token, ms",
    "ms per row", "written in, ms", "pays after",
)  # fmt: skip
OPTIONAL = (
    "rows",
    "metric",
    "pays after",
    "written in, ms",
    "ms per row",
    "first token, ms",
    "prompt tokens",
)
"""Left out on a narrow terminal, the last one first."""


def _row(t: dict[str, Any]) -> list[str]:
    """The cells of one task. `a -> b`: with the description in front of the prompt, and without it."""
    tokens, first = t["prompt_tokens"], t["first_token_ms"]
    saved_ms = first["told"] - first["bare"]
    scores = [
        f"{output.format_number(t[k]['value'])} ± {output.format_number(t[k]['stderr'])}"
        for k in ("bare", "told", "written")
    ]
    return [
        t["task"], "yes" if t["seen"] else "no", t["metric"], str(t["rows"]), *scores,
        f"{tokens['told']:.0f} -> {tokens['bare']:.0f}", f"{first['told']:.1f} -> {first['bare']:.1f}",
        f"{t['told']['row_ms']:.1f} -> {t['written']['row_ms']:.1f}", f"{t['written_ms']:.0f}",
        f"{math.ceil(t['written_ms'] / saved_ms)} prompts" if saved_ms > 0 else "never",
    ]  # fmt: skip


def _markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown page."""
    config, environment, shots = report["train_config"], report["environment"], report["shots"]
    trained, seconds = f"{report['trainable_params']:,}", f"{report['train_seconds']:.0f}"
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(_row, report["tasks"])]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"""# {report["method"]}: a description in the weights instead of in the context

Made by `{report["command"]}`

One generator with {trained} trained numbers on {report["model"]}, trained on the seen tasks together for
{config["steps"]} steps of {config["batch_size"]} rows ({seconds} s). A description is the task in words,
with {shots} worked examples.

{table}

- Scores, with their standard error: base, the untuned model on the bare prompt; base, told: with the
  description in front of the prompt; written: weights made from the description, merged, on the bare prompt.
- `a -> b`: with the description in front of the prompt, and without it. Prompt tokens: mean over the scored
  prompts. First token: one prompt, batch of one, median of nine. Ms per row: scoring, in batches.
- written in: reading the description, mixing and merging, once per description. pays after: that time over
  the time to the first token that a prompt saves.
- {environment["device"]}, {environment["threads"]} threads, torch {environment["versions"]["torch"]}.
"""
