"""`peftzoo check`: the conformance checks of one method or of all."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import redirect_stdout

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo check lora")(check)


def check(
    name: str = typer.Argument("", help="A method, or all."),
    plugin: list[str] = output.PLUGIN,
    list_checks: bool = typer.Option(False, "--list", help="Print what each check proves, and run none."),
    verbose: bool = typer.Option(False, "-v", "--verbose", help="Print the traceback of each failure."),
    json: bool = output.JSON,
) -> None:
    """Run all conformance checks on tiny BERT, Llama, GPT-2 models."""
    from peftzoo.contract import registry
    from peftzoo.errors import UserError
    from peftzoo.runs import quick_checks

    if not name and not list_checks:
        raise UserError("say which method to check: peftzoo check lora, or all, or --list")
    if not plugin and not list_checks:
        quick_checks.check_methods(output.parse_names(name, registry.methods(), "method"))
    from peftzoo import conform  # heavy: what is wrong above is told before
    from peftzoo.conform import process

    listed = conform.checks()  # before a plugin is loaded
    if list_checks:
        return _print_list(listed, json)
    output.load_plugins(plugin)
    methods = output.parse_names(name, registry.methods(), "method")
    for m in methods:
        registry.get(m)  # a wrong name is told before the first check
    if replaced := process.replaced_own_function():
        raise UserError(f"a plugin replaces {replaced}: take that out, a method may not change the checks")
    results_by_method = {}
    with redirect_stdout(sys.stderr), output.status_line("") as status:
        for number, m in enumerate(methods, 1):
            status(text := f"checking {m} ({number} of {len(methods)}): {len(conform.plan())} checks")
            if not sys.stderr.isatty():
                output.note(text)
            results_by_method[m] = conform.run(m)
    failed = [r for results in results_by_method.values() for r in results if r.outcome == "failed"]
    if json:
        output.print_json([
            {"name": f"{m}/{r.check}/{r.arch}", "status": r.outcome, "method": m, "check": r.check,
             "model": r.arch,
             "reason": r.reason, "place": r.place, "seconds": round(r.seconds, 3)}
            for m, results in results_by_method.items() for r in results
        ])  # fmt: skip
    elif len(methods) == 1:
        _print_checks(methods[0], results_by_method[methods[0]])
    else:
        _print_summary(results_by_method)
    _print_failures(failed, verbose)
    if not json:
        _print_verdict(results_by_method, plugin)
    if failed:
        raise typer.Exit(1)


def _print_list(listed: list, json: bool) -> None:
    """Print the name of each check, where it runs and what a pass means."""
    rows = [(c.name, ", ".join(c.archs) or "once", c.proves) for c in listed]
    if json:
        output.print_json([{"name": n, "models": m, "proves": p} for n, m, p in rows])
    else:
        output.print_table(f"{len(rows)} checks", ("check", "on", "proves"), rows)


def _print_failures(failed: list, verbose: bool) -> None:
    """Print each reason once, with the file and line that it is about and the models where it was seen."""
    by_reason: dict[tuple, list] = {}
    for r in failed:
        by_reason.setdefault((r.method, r.check, r.reason), []).append(r)
    for (method, check, reason), results in by_reason.items():
        models = ", ".join(dict.fromkeys(r.arch for r in results if r.arch != "-"))
        place = f"{results[0].place}: " if results[0].place else ""
        output.note(f"failed: {place}{method}, {check}{' on ' if models else ''}{models}: {reason}")
        if verbose and results[0].trace:
            output.note(results[0].trace.rstrip())


def _print_verdict(results_by_method: dict[str, list], plugin: list[str]) -> None:
    """Print what to do next and in one line which methods hold."""
    failed = [r for results in results_by_method.values() for r in results if r.outcome == "failed"]
    if failed:
        first, methods = failed[0], dict.fromkeys(r.method for r in failed)
        output.next_step(
            f"mend {first.place or first.method} first (-v has tracebacks); what the paper wants so is "
            f'declared: known_failures = {{"{first.check}": "why"}}'
        )
        checks = len({(r.method, r.check) for r in failed})
        print(f"Not all checks hold for {', '.join(methods)}: {checks} failed, the lines above say why.")
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
    told: set[str] = set()
    rows = [
        [check, *(by_arch[a].outcome if a in by_arch else "" for a in archs), _why(by_arch.values(), told)]
        for check, by_arch in by_check.items()
    ]
    counts = ", ".join(
        f"{sum(r.outcome == o for r in results)} {o}" for o in ("ok", "known", "skipped", "failed")
    )
    output.print_table(f"{name}: {counts}", ("check", *archs, "why"), rows)


def _why(results: Iterable, told: set[str]) -> str:
    """The reasons of one check; one that an earlier row told is not told again, nor one that stands below."""
    reasons = []
    for r in results:
        if r.outcome == "failed":
            reasons.append("see below")
        elif r.reason:
            reasons.append("as above" if r.reason in told else r.reason)
    told |= {r.reason for r in results}
    return "; ".join(dict.fromkeys(reasons))


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
