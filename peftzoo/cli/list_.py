"""`peftzoo list`: the known methods, tasks or models."""

from __future__ import annotations

from typing import Any

import typer

from peftzoo.cli import output

KINDS = ("methods", "tasks", "models")
COLUMNS = {
    "methods": ("name", "family", "lr", "merges", "title"),
    "models": ("name", "kind", "parameters", "where", "description"),
}
"""Of the tables; `--json` has all facts."""
MORE = {
    "methods": "peftzoo show NAME, for more of each",
    "models": "peftzoo models get NAME brings a real one here",
}


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command("list", epilog="Example: peftzoo list methods")(list_)


def list_(
    what: str = typer.Argument(..., metavar="methods|tasks|models"), json: bool = output.JSON,
    plugin: list[str] = output.PLUGIN,
) -> None:  # fmt: skip
    """List methods, tasks or models."""
    from peftzoo.errors import unknown

    if what not in KINDS:
        raise unknown("list", what, KINDS)
    output.load_plugins(plugin)
    rows = {"methods": methods, "tasks": tasks, "models": models}[what]()
    if json:
        output.print_json(rows)
        return
    if what == "tasks":
        _print_suites(rows)
        return
    columns = COLUMNS[what]
    cells = [[_cell(r[c]) for c in columns] for r in rows]
    output.print_table(f"{len(rows)} {what}", columns, cells, right=("parameters", "lr"))
    for row in rows if what == "methods" else ():
        if row["origin"] != "peftzoo":
            print(f"{row['name']} is not part of peftzoo: {row['origin']}")
    output.next_step(MORE[what])


def _print_suites(rows: list[dict[str, Any]]) -> None:
    """Print a table per suite, and the groups of tasks."""
    from peftzoo.tasks import task_files

    for name in dict.fromkeys(r["suite"] for r in rows):
        suite_rows = [r for r in rows if r["suite"] == name]
        cells = [[r["name"], r["metric"], _cell(r["protocol"]), _cell(r["embedded_rows"]),
                  "yes" if "mirror" in r["sources"] else ""] for r in suite_rows]  # fmt: skip
        columns = ("name", "metric", "protocol", "generated", "mirror")
        output.print_table(f"{name}: {len(suite_rows)} tasks", columns, cells, right=("generated",))
    members = {name: task_files.expand([name]) for name in task_files.groups()}
    run_one_by_one = [f"{name} ({len(tasks)})" for name, tasks in members.items() if tasks != [name]]
    print(f"Groups whose tasks are run one by one: {', '.join(run_one_by_one)}.")
    print(
        "generated: scored rows of the embedded generator. mirror: whether PEFTZOO_DATA has the scored rows."
    )
    output.next_step("peftzoo show NAME, for more of each")


def _cell(value: Any) -> Any:
    """A value as the text of a cell."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:,}" if isinstance(value, int) else value


def methods() -> list[dict[str, Any]]:
    """A row of facts per method."""
    from peftzoo.contract import registry

    rows = []
    for name in registry.methods():
        cls = registry.get(name)
        rows.append({
            "name": name, "title": cls.title, "family": cls.family, "merges": bool(cls.mergeable),
            "identity": cls.identity_at_init, "lr": cls.lr, "hf_peft": cls.peft or None, "paper": cls.paper,
            "origin": registry.origin(name),
        })  # fmt: skip
    return rows


def tasks() -> list[dict[str, Any]]:
    """A row of facts per task, and per group whose tasks are trained together."""
    from peftzoo.tasks import task_files

    together = [name for name in task_files.groups() if task_files.expand([name]) == [name]]
    rows = [_group_row(task_files.task_group(name)) for name in [*task_files.tasks(), *together]]
    return sorted(rows, key=lambda row: (row["suite"], row["name"]))


def _group_row(task_group: Any) -> dict[str, Any]:
    """The row of a task, or of a group whose tasks are trained together."""
    from peftzoo.tasks import sources

    mirror = sources.mirror_folder(None)
    about, members = task_group.about, task_group.tasks
    metric = members[0].extra.metric if len(members) == 1 else f"mean of {len(members)} tasks"
    embedded = [t for t in members if t.extra.embedded]
    rows = sum(
        t.extra.embedded.test if t.eval_split == t.test_split else t.extra.embedded.validation
        for t in embedded
    )
    heads = {t.extra.head.kind for t in members if t.extra.head}
    available = [sources.available_sources(t, mirror) for t in members]
    return {
        "suite": about.suite, "name": task_group.name, "title": about.title, "metric": metric,
        "protocol": [about.protocol, *about.protocols], "causal": members[0].extra.causal,
        "head": "/".join(sorted(heads)) or None, "embedded_rows": rows or None,
        "sources": [s for s in sources.SOURCES if all(s in found for found in available)],
    }  # fmt: skip


def models() -> list[dict[str, Any]]:
    """A row of facts per known model."""
    from peftzoo.models import catalogue

    return catalogue.known()
