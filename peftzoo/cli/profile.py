"""`peftzoo profile`: step time and activation memory against the frozen-model floor, and against HF PEFT."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

from peftzoo.adapters import write_atomically
from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo profile --method lora,dora --against peft")(profile)


def profile(
    method: str = typer.Option(..., "--method", "-m", help="Methods, with commas, or all."),
    against: str = typer.Option(None, help="peft: measure HF PEFT's version in the same run."),
    rounds: int = typer.Option(9, min=1, help="Rounds; each measures floor, method and rival once."),
    model: str = typer.Option(None, help="A language model by name (default: an 8-layer Llama, 576 wide)."),
    batch_size: int = typer.Option(4, min=1, help="Rows per step."),
    length: int = typer.Option(128, min=2, help="Tokens per row."),
    set_: list[str] = output.SET,
    out: Path = typer.Option(None, help="Write the table to this Markdown file too."),
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Measure training steps as ratios to those of the frozen model.

    Time and memory of a forward and backward pass. Methods for linear layers are measured on all of them, so
    that their steps compare; --set targets=... chooses others.
    """
    from peftzoo.contract import registry
    from peftzoo.errors import UserError, unknown
    from peftzoo.runs import quick_checks

    output.load_plugins(plugin)
    chosen = output.parse_names(method, registry.methods(), "method")
    set_options = output.parse_set(set_, chosen)
    quick_checks.check_methods(chosen)
    quick_checks.check_model(model)
    if against not in (None, "peft"):
        raise unknown("rival", against, ["peft"])
    if against:
        quick_checks.check_installed(against)
    from peftzoo.measuring import step_profile as engine  # heavy: what is wrong above is told before

    options: dict[str, dict[str, str]] = {}
    for name in chosen:
        try:
            options[name] = _options(registry.get(name), set_options[name])
        except UserError as error:
            if method != "all":
                raise
            output.note(f"skipped: {error}")
    chosen, rows = list(options), []
    with redirect_stdout(sys.stderr), output.status_line("") as status:
        for number, name in enumerate(chosen, 1):
            status(f"{name} ({number} of {len(chosen)})")
            rows += engine.profile(
                [name], against=against, rounds=rounds, model=_model_builder(model), options=options,
                batch_size=batch_size, length=length,
            )  # fmt: skip
    if out is not None:
        write_atomically(
            out, engine.markdown_page(rows, _command(), _conditions(rounds, batch_size, length)).encode()
        )
        output.note(f"wrote {out}")
    if json:
        output.print_json(rows)
    else:
        _print_rows(rows, against)
    if any(r["status"] != "ok" for r in rows):
        raise typer.Exit(1)


def _command() -> str:
    """The command line as it was typed, for the page."""
    return shlex.join(["peftzoo", *sys.argv[1:]])


def _conditions(rounds: int, batch_size: int, length: int) -> str:
    """Device, batch and versions of a measurement, for the page."""
    from peftzoo.measuring.counters import environment

    env = environment()
    versions = ", ".join(
        f"{k} {v}" for k, v in env["versions"].items() if k in ("torch", "transformers", "peft")
    )
    return (
        f"{env['device']}, {env['threads']} threads; {batch_size} x {length} tokens, fp32, median of "
        f"{rounds} rounds in which floor, ours and PEFT take turns; {versions}."
    )


def _options(cls: type, options: dict[str, str]) -> dict[str, str]:
    """The options, with `targets=all` added if the method accepts every linear layer.

    Raises the `UserError` of options that do not fit, before anything is measured.
    """
    import torch

    from peftzoo.adapters import attach, configure
    from peftzoo.contract import LINEAR
    from peftzoo.errors import UserError
    from peftzoo.measuring.step_profile import small_llama

    with torch.device("meta"):
        model = small_llama()
    if cls.kind == LINEAR and "targets" in cls.Config.model_fields and "targets" not in options:
        try:
            attach(model, configure(cls, options | {"targets": "all"})).detach()
            return options | {"targets": "all"}
        except UserError:
            pass
    attach(model, configure(cls, options)).detach()
    return options


def _model_builder(model: str | None) -> Callable | None:
    """A function that loads the named model; None for the default model."""
    if model is None:
        return None

    def build() -> object:
        from peftzoo import models
        from peftzoo.errors import UserError

        if not models.is_causal(model):
            raise UserError(f'model "{model}" is an encoder: profile takes a language model')
        return models.load(model).model

    return build


def _print_rows(rows: list[dict[str, Any]], against: str | None) -> None:
    """Print the table; with the columns of HF PEFT if it was measured too."""
    columns = ["method", "trained", "step ms", "step / floor", "saved MiB", "floor saves"]
    columns += ["PEFT step / floor", "PEFT saved MiB"] if against else []
    cells = [
        [r["name"], output.format_count(r["trainable_params"]), output.format_number(r["step_ms"], 1),
         output.format_number(r["floor_ratio"], 2), output.format_number(r["saved_mib"], 0),
         output.format_number(r["floor_saved_mib"], 0)]
        + ([output.format_number(r["peft_floor_ratio"], 2), output.format_number(r["peft_saved_mib"], 0)]
           if against else [])
        for r in rows
    ]  # fmt: skip
    title = "Training step as a ratio to the frozen-model floor, and memory kept for backward"
    optional = ("step ms", "trained", "floor saves", "saved MiB", "PEFT saved MiB")
    output.print_table(title, columns, cells, right=columns[1:], optional=optional)
    for r in rows:
        if r["reason"]:
            print(f"{r['name']}: {r['reason']}")
    if against is None:
        output.next_step("--against peft measures HF PEFT's versions beside these")
    else:
        output.next_step("--rounds 15 on a quiet machine for ratios to quote; --out FILE.md keeps the table")
