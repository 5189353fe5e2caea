"""`peftzoo check`: the conformance checks of one method or of all."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo check lora")(check)


def check(
    name: str = typer.Argument(..., help="A method, or all."),
    plugin: list[str] = output.PLUGIN,
    json: bool = output.JSON,
) -> None:
    """Run all conformance checks on tiny BERT, Llama, GPT-2 models."""
    from peftzoo import conform
    from peftzoo.contract import registry

    output.load_plugins(plugin)
    methods = output.parse_names(name, registry.methods(), "method")
    for m in methods:
        registry.get(m)  # a wrong name is told before the first check
    results_by_method = {}
    with redirect_stdout(sys.stderr), output.status_line("") as status:
        for number, m in enumerate(methods, 1):
            status(text := f"checking {m} ({number} of {len(methods)}): {len(conform.plan())} checks")
            if not sys.stderr.isatty():
                output.note(text)
            results_by_method[m] = conform.run(m)
    failed = [(m, r) for m, results in results_by_method.items() for r in results if r.outcome == "failed"]
    if json:
        output.print_json([
            {"name": f"{m}/{r.check}/{r.arch}", "status": r.outcome, "method": m, "check": r.check,
             "model": r.arch,
             "reason": r.reason, "seconds": round(r.seconds, 3)}
            for m, results in results_by_method.items() for r in results
        ])  # fmt: skip
    elif len(methods) == 1:
        _print_checks(methods[0], results_by_method[methods[0]])
    else:
        _print_summary(results_by_method)
    for m, r in failed:
        output.note(f"failed: {m}, {r.check} on {r.arch}: {r.reason}")
    if not json:
        _print_verdict(results_by_method, plugin)
    if failed:
        raise typer.Exit(1)


def _print_verdict(results_by_method: dict[str, list], plugin: list[str]) -> None:
    """Print in one line which methods hold, and what to do next."""
    bad = [m for m, results in results_by_method.items() if any(r.outcome == "failed" for r in results)]
    if bad:
        print(f"Not all checks hold for {', '.join(bad)}: the lines above say what is wrong.")
        output.next_step("mend the first of them; peftzoo show METHOD has the equations")
    elif len(results_by_method) == 1:
        (name,) = results_by_method
        print(f"{name} passes every check.")
        files = "".join(f" --plugin {file}" for file in plugin)
        output.next_step(f"peftzoo bench --method {name} --task gsm8k{files}")
    else:
        print(f"All {len(results_by_method)} methods pass every check.")
        output.next_step("peftzoo bench --method all --task gsm8k")


def _print_checks(name: str, results: list) -> None:
    """Print a table of one method: a row per check, a column per architecture."""
    archs = list(dict.fromkeys(r.arch for r in results))
    by_check: dict[str, dict] = {}
    for r in results:
        by_check.setdefault(r.check, {})[r.arch] = r
    rows = [
        [check, *(by_arch[a].outcome if a in by_arch else "" for a in archs),
         "; ".join(dict.fromkeys(r.reason for r in by_arch.values() if r.reason))]
        for check, by_arch in by_check.items()
    ]  # fmt: skip
    counts = ", ".join(
        f"{sum(r.outcome == o for r in results)} {o}" for o in ("ok", "known", "skipped", "failed")
    )
    output.print_table(f"{name}: {counts}", ("check", *archs, "why"), rows)


def _print_summary(results_by_method: dict[str, list]) -> None:
    """Print a table of several methods: how many checks had each outcome."""
    outcomes = ("ok", "known", "skipped", "failed")
    rows = [
        [
            method,
            *(sum(r.outcome == o for r in results) for o in outcomes),
            f"{sum(r.seconds for r in results):.1f}",
        ]
        for method, results in results_by_method.items()
    ]
    columns = ("method", *outcomes, "seconds")
    output.print_table(f"{len(results_by_method)} methods", columns, rows, right=columns[1:])
