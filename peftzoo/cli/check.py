"""`peftzoo check`: the conformance checks of one method or of all."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    app.command(epilog="Example: peftzoo check lora")(check)


def check(
    name: str = typer.Argument(..., help="A method, or all."),
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Run every conformance check on tiny BERT, Llama and GPT-2 models."""
    from peftzoo import conform
    from peftzoo.contract import registry

    output.load_plugins(plugin)
    chosen = output.names(name, registry.methods(), "method")
    with redirect_stdout(sys.stderr):
        found = {n: conform.run(n) for n in chosen}
    bad = [(n, r) for n, results in found.items() for r in results if r.outcome == "failed"]
    if json:
        output.as_json([
            {"name": f"{n}/{r.check}/{r.arch}", "status": r.outcome, "method": n, "check": r.check,
             "model": r.arch,
             "reason": r.reason, "seconds": round(r.seconds, 3)}
            for n, results in found.items() for r in results
        ])  # fmt: skip
    elif len(chosen) == 1:
        _one(chosen[0], found[chosen[0]])
    else:
        _many(found)
    for n, r in bad:
        output.note(f"failed: {n}, {r.check} on {r.arch}: {r.reason}")
    if bad:
        raise typer.Exit(1)


def _one(name: str, results: list) -> None:
    archs = list(dict.fromkeys(r.arch for r in results))
    rows: dict[str, dict] = {}
    for r in results:
        rows.setdefault(r.check, {})[r.arch] = r
    shown = [
        [check, *(by[a].outcome if a in by else "" for a in archs),
         "; ".join(dict.fromkeys(r.reason for r in by.values() if r.reason))]
        for check, by in rows.items()
    ]  # fmt: skip
    counts = ", ".join(
        f"{sum(r.outcome == o for r in results)} {o}" for o in ("ok", "known", "skipped", "failed")
    )
    output.table(f"{name}: {counts}", ("check", *archs, "why"), shown)


def _many(found: dict[str, list]) -> None:
    outcomes = ("ok", "known", "skipped", "failed")
    shown = [
        [
            n,
            *(sum(r.outcome == o for r in results) for o in outcomes),
            f"{sum(r.seconds for r in results):.1f}",
        ]
        for n, results in found.items()
    ]
    columns = ("method", *outcomes, "seconds")
    output.table(f"{len(found)} methods", columns, shown, right=columns[1:])
