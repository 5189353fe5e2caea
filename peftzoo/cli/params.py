"""`peftzoo params`: exact parameter counts on a model of the meta device, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from peftzoo.adapters import write_atomically
from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo params --method unilora --model llama-2-7b --set d=524288")(params)


def params(
    method: str = typer.Option(..., "--method", "-m", help="Methods, with commas, or all."),
    model: str = typer.Option(
        "embedded", help="A published shape, an alias, or a folder (peftzoo list models)."
    ),
    preset: str = typer.Option(None, help="A published setting of the method (peftzoo show METHOD)."),
    set_: list[str] = output.SET,
    published: bool = typer.Option(False, help="The counts that publications print, beside ours."),
    out: Path = typer.Option(None, help="With --published: write the table to this Markdown file."),
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Count trainable parameters exactly; no weights are loaded."""
    from peftzoo.contract import registry
    from peftzoo.errors import UserError
    from peftzoo.models import catalogue
    from peftzoo.runs import quick_checks

    output.load_plugins(plugin)
    names = output.parse_names(method, registry.methods(), "method")
    quick_checks.check_methods(names)
    quick_checks.check_model(model, weights=False)
    if published:
        return _print_published(names, out, json)
    if out is not None:
        raise UserError(f'--out "{out}" is for the table of --published')
    rows, set_options = [], output.parse_set(set_, names)
    for name in names:
        try:
            rows.append(_count(name, model, preset, set_options[name]))
        except UserError as error:
            if len(names) == 1:
                raise
            rows.append({"name": f"{name}/{model}", "status": "failed", "method": name, "reason": str(error)})
    counted = [r for r in rows if r["status"] == "ok"]
    if not counted:
        raise UserError(rows[0]["reason"])
    if json:
        output.print_json(rows)
        return
    _print_rows(model, rows, counted[0]["base_params"])
    shape = None if model in catalogue.aliases() else catalogue.shapes().get(model)
    with_weights = shape["hub"] if shape else model
    output.next_step(f"peftzoo bench --method {method} --task gsm8k --model {with_weights}")


def _count(name: str, model: str, preset: str | None, set_options: dict[str, str]) -> dict[str, Any]:
    """The row of one method. Raises `UserError` where it does not fit the model."""
    from peftzoo import models
    from peftzoo.adapters import attach, configure
    from peftzoo.contract import registry
    from peftzoo.records.published import NONE, get

    cls = registry.get(name)
    adapter = configure(cls, (get(cls, preset) if preset else NONE).options | set_options)
    base = models.on_meta(model)
    total = sum(p.numel() for p in base.parameters())
    attached = attach(base, adapter)
    return {
        "name": f"{name}/{model}", "status": "ok", "method": name, "model": model,
        "trainable_params": attached.trainable_count(),
        "stored_params": sum(t.numel() for t in attached.state_dict().values()), "base_params": total,
        "sites": len(attached.sites), "config": adapter.config.model_dump(mode="json"),
    }  # fmt: skip


def _print_rows(model: str, rows: list[dict[str, Any]], total: int) -> None:
    """Print the counts, with the reason for a method that does not fit."""
    cells = [
        [r["method"], output.format_count(r["trainable_params"]),
         f"{100 * r['trainable_params'] / total:.4f} %", output.format_count(r["stored_params"]), r["sites"],
         ", ".join(f"{k}={_as_text(v)}" for k, v in r["config"].items())]
        if r["status"] == "ok" else [r["method"], "", "", "", "", r["reason"]]
        for r in rows
    ]  # fmt: skip
    columns = ("method", "trained", "of base", "stored", "sites", "options")
    output.print_table(f"{model}: {total:,} parameters", columns, cells, right=columns[1:5])


def _print_published(methods: list[str], out: Path | None, json: bool) -> None:
    """Print or write the parameter counts of publications beside ours."""
    from peftzoo.records.published import counts, markdown

    rows = counts(methods)
    if out is not None:
        write_atomically(out, markdown(rows).encode())
        output.note(f"{len(rows)} counts: {out}")
    if json:
        output.print_json(rows)
    elif out is None:
        columns = ("method", "preset", "model", "printed", "here", "")
        cells = [
            [r["method"], r["preset"], r["model"], r["printed"], output.format_count(r["trainable_params"]),
             "equal" if r["agrees"] else f"differs: {r['reason'] or 'no reason known'}"]
            for r in rows
        ]  # fmt: skip
        output.print_table(f"{len(rows)} published counts", columns, cells, right=("printed", "here"))
        output.next_step("peftzoo show METHOD, for the settings behind a preset")


def _as_text(value: object) -> object:
    """A list of names as `a,b`; any other value unchanged."""
    return ",".join(map(str, value)) if isinstance(value, list) else value
