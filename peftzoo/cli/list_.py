"""`peftzoo list`: the methods, tasks or models that there are."""

from __future__ import annotations

from typing import Any

import typer

from peftzoo.cli import output

KINDS = ("methods", "tasks", "models")


def add(app: typer.Typer) -> None:
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
        output.as_json(rows)
        return
    if what == "tasks":
        _suites(rows)
        return
    shown = [[_cell(v) for v in r.values()] for r in rows]
    output.table(f"{len(rows)} {what}", [*rows[0]], shown, right=("parameters", "lr"))


def _suites(rows: list[dict[str, Any]]) -> None:
    """A table per suite, and the groups."""
    from peftzoo.tasks import task_files

    for name in dict.fromkeys(r["suite"] for r in rows):
        mine = [r for r in rows if r["suite"] == name]
        shown = [[r["name"], r["metric"], _cell(r["protocol"]), _cell(r["embedded_rows"]),
                  "yes" if "mirror" in r["sources"] else ""] for r in mine]  # fmt: skip
        columns = ("name", "metric", "protocol", "generated", "mirror")
        output.table(f"{name}: {len(mine)} tasks", columns, shown, right=("generated",))
    apart = {name: task_files.expand([name]) for name in task_files.groups()}
    words = [f"{name} ({len(members)})" for name, members in apart.items() if members != [name]]
    print(f"Groups whose tasks are run one by one: {', '.join(words)}.")
    print(
        "generated: scored rows of the embedded generator. mirror: whether PEFTZOO_DATA has the scored rows."
    )
    print("More of each: peftzoo show NAME")


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:,}" if isinstance(value, int) else value


def methods() -> list[dict[str, Any]]:
    from peftzoo.contract import registry

    found = []
    for name in registry.methods():
        cls = registry.get(name)
        found.append({
            "name": name, "title": cls.title, "family": cls.family, "merges": bool(cls.mergeable),
            "identity": cls.identity_at_init, "lr": cls.lr, "hf_peft": cls.peft or None, "paper": cls.paper,
        })  # fmt: skip
    return found


def tasks() -> list[dict[str, Any]]:
    from peftzoo.tasks import task_files

    together = [name for name in task_files.groups() if task_files.expand([name]) == [name]]
    found = [_task_group(task_files.task_group(name)) for name in [*task_files.tasks(), *together]]
    return sorted(found, key=lambda row: (row["suite"], row["name"]))


def _task_group(task_group: Any) -> dict[str, Any]:
    """A task, or the tasks of a group that is trained together, as one row."""
    from peftzoo.tasks import sources

    mirror = sources.mirror_folder(None)
    about, members = task_group.about, task_group.tasks
    metric = members[0].extra.metric if len(members) == 1 else f"mean of {len(members)} tasks"
    made = [t for t in members if t.extra.embedded]
    rows = sum(
        t.extra.embedded.test if t.eval_split == t.test_split else t.extra.embedded.validation for t in made
    )
    heads = {t.extra.head.kind for t in members if t.extra.head}
    return {
        "suite": about.suite, "name": task_group.name, "title": about.title, "metric": metric,
        "protocol": [about.protocol, *about.protocols], "causal": members[0].extra.causal,
        "head": "/".join(sorted(heads)) or None, "embedded_rows": rows or None,
        "sources": [s for s in sources.SOURCES if all(s in sources.sources(t, mirror) for t in members)],
    }  # fmt: skip


def models() -> list[dict[str, Any]]:
    from peftzoo.models import catalogue

    return catalogue.known()
