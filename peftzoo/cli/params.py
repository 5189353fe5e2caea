"""`peftzoo params`: exact parameter counts on a model of the meta device, without weights."""

from __future__ import annotations

from pathlib import Path

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
    from peftzoo import models
    from peftzoo.adapters import attach, configure
    from peftzoo.contract import registry
    from peftzoo.errors import UserError
    from peftzoo.records.published import NONE, get

    output.load_plugins(plugin)
    names = output.parse_names(method, registry.methods(), "method")
    if published:
        return _print_published(names, out, json)
    if out is not None:
        raise UserError(f'--out "{out}" is for the table of --published')
    rows, set_options = [], output.parse_set(set_, names)
    for name in names:
        cls = registry.get(name)
        options = (get(cls, preset) if preset else NONE).options | set_options[name]
        adapter = configure(cls, options)
        base = models.on_meta(model)
        total = sum(p.numel() for p in base.parameters())
        attached = attach(base, adapter)
        stored = sum(t.numel() for t in attached.state_dict().values())
        rows.append({
            "name": f"{name}/{model}", "status": "ok", "method": name, "model": model,
            "trainable_params": attached.trainable_count(), "stored_params": stored, "base_params": total,
            "sites": len(attached.sites), "config": adapter.config.model_dump(mode="json"),
        })  # fmt: skip
    if json:
        output.print_json(rows)
        return
    cells = [
        [r["method"], output.format_count(r["trainable_params"]),
         f"{100 * r['trainable_params'] / r['base_params']:.4f} %",
         output.format_count(r["stored_params"]), r["sites"],
         ", ".join(f"{k}={_as_text(v)}" for k, v in r["config"].items())]
        for r in rows
    ]  # fmt: skip
    title = f"{model}: {rows[0]['base_params']:,} parameters"
    output.print_table(title, ("method", "trained", "of base", "stored", "sites", "options"), cells,
               right=("trained", "of base", "stored", "sites"))  # fmt: skip


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


def _as_text(value: object) -> object:
    """A list of names as `a,b`; any other value unchanged."""
    return ",".join(map(str, value)) if isinstance(value, list) else value
