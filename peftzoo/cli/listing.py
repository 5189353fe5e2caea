"""`peftzoo list` and `peftzoo show`."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from peftzoo.cli import show

KINDS = ("methods", "tasks", "models")


def add(app: typer.Typer) -> None:
    app.command("list", epilog="Example: peftzoo list methods")(list_)
    app.command("show", epilog="Example: peftzoo show unilora")(show_)


def list_(
    what: str = typer.Argument(..., metavar="methods|tasks|models"), json: bool = show.JSON,
    plugin: list[str] = show.PLUGIN,
) -> None:  # fmt: skip
    """List methods, tasks or models."""
    from peftzoo.errors import unknown

    if what not in KINDS:
        raise unknown("list", what, KINDS)
    show.load_plugins(plugin)
    rows = {"methods": methods, "tasks": tasks, "models": models}[what]()
    if json:
        show.as_json(rows)
        return
    if what == "tasks":
        _suites(rows)
        return
    shown = [[_cell(v) for v in r.values()] for r in rows]
    show.table(f"{len(rows)} {what}", [*rows[0]], shown, right=("parameters", "lr"))


def _suites(rows: list[dict[str, Any]]) -> None:
    """A table per suite, and the groups."""
    from peftzoo import suite

    for name in dict.fromkeys(r["suite"] for r in rows):
        mine = [r for r in rows if r["suite"] == name]
        shown = [[r["name"], r["metric"], _cell(r["protocol"]), _cell(r["embedded_rows"]),
                  "yes" if "mirror" in r["sources"] else ""] for r in mine]  # fmt: skip
        columns = ("name", "metric", "protocol", "generated", "mirror")
        show.table(f"{name}: {len(mine)} tasks", columns, shown, right=("generated",))
    apart = {name: suite.expand([name]) for name in suite.groups()}
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
    from peftzoo import registry

    found = []
    for name in registry.methods():
        cls = registry.get(name)
        found.append({
            "name": name, "title": cls.title, "family": cls.family, "merges": bool(cls.mergeable),
            "identity": cls.identity_at_init, "lr": cls.lr, "hf_peft": cls.peft or None, "paper": cls.paper,
        })  # fmt: skip
    return found


def tasks() -> list[dict[str, Any]]:
    from peftzoo import suite

    together = [name for name in suite.groups() if suite.expand([name]) == [name]]
    found = [_course(suite.course(name)) for name in [*suite.tasks(), *together]]
    return sorted(found, key=lambda row: (row["suite"], row["name"]))


def _course(course: Any) -> dict[str, Any]:
    """A task, or the tasks of a group that is trained together, as one row."""
    from peftzoo import data

    mirror = data.mirror_folder(None)
    about, members = course.about, course.tasks
    metric = members[0].extra.metric if len(members) == 1 else f"mean of {len(members)} tasks"
    made = [t for t in members if t.extra.embedded]
    rows = sum(
        t.extra.embedded.test if t.eval_split == t.test_split else t.extra.embedded.validation for t in made
    )
    heads = {t.extra.head.kind for t in members if t.extra.head}
    return {
        "suite": about.suite, "name": course.name, "title": about.title, "metric": metric,
        "protocol": [about.protocol, *about.protocols], "causal": members[0].extra.causal,
        "head": "/".join(sorted(heads)) or None, "embedded_rows": rows or None,
        "sources": [s for s in data.SOURCES if all(s in data.sources(t, mirror) for t in members)],
    }  # fmt: skip


def models() -> list[dict[str, Any]]:
    from peftzoo import fetch

    return fetch.known()


def show_(name: str = typer.Argument(..., help="A method or a task."), json: bool = show.JSON,
          plugin: list[str] = show.PLUGIN) -> None:  # fmt: skip
    """Show one method (equation, paper, options) or one task (prompt, metric, settings)."""
    from peftzoo import registry, suite
    from peftzoo.errors import unknown

    show.load_plugins(plugin)
    if name in registry.methods() or ":" in name:
        _show_method(name, json)
    elif name in suite.groups():
        _show_group(name, suite.groups()[name], json)
    elif name in suite.tasks() or name.endswith((".yaml", ".yml")):
        _show_task(name, json)
    else:
        known = [*registry.methods(), *suite.groups(), *suite.tasks()]
        raise unknown("name", name, known, see="peftzoo list methods")


def _show_method(name: str, json: bool) -> None:
    from peftzoo import published, registry

    cls = registry.get(name)
    text = cls.card or inspect.getdoc(inspect.getmodule(cls)) or ""
    options = [
        {"option": k, "default": _plain(f.get_default(call_default_factory=True)), "meaning": f.description}
        for k, f in cls.Config.model_fields.items()
    ]
    presets = published.presets(cls)
    if json:
        facts = {
            k: getattr(cls, k) for k in ("name", "title", "paper", "family", "peft", "lr", "identity_at_init")
        }
        show.as_json({**facts, "mergeable": bool(cls.mergeable), "card": text, "options": options,
                      "presets": {k: p.model_dump(mode="json") for k, p in presets.items()}})  # fmt: skip
        return
    print(f"{name}: {cls.title}\n\n{text}\n")
    if options:
        show.table("Options (--set KEY=VALUE)", options[0], [o.values() for o in options])
    if presets:
        rows = [(k, _pairs(p.options), _pairs(p.train), p.source) for k, p in presets.items()]
        show.table("Published settings (--preset NAME)", ("preset", "options", "training", "source"), rows)
    print(f"Learning rate: {cls.lr:g} by default.\n\nTry: peftzoo bench --method {name} --task gsm8k")


def _pairs(given: dict[str, Any]) -> str:
    return ", ".join(f"{k}={_plain(v)}" for k, v in given.items())


def _plain(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _show_group(name: str, members: tuple[str, ...], json: bool) -> None:
    from peftzoo import suite

    about = suite.course(name).about.model_dump(mode="json") if suite.expand([name]) == [name] else {}
    if json:
        show.as_json({"group": name, "tasks": list(members), **about})
        return
    how = "trained together, one model for all" if about else "run one by one"
    print(f"{name}: {len(members)} tasks, {how}\n\n" + "\n".join(members))
    if rows := [(k, v) for k, v in about.items() if v not in (None, "", [], {})]:
        show.table("Together", ("key", "value"), rows)
    print(f"\nTry: peftzoo bench --method lora --task {name}")


def _show_task(name: str, json: bool) -> None:
    from peftzoo import suite

    task = suite.get(name)
    facts = task.model_dump(mode="json")
    if json:
        show.as_json(facts)
        return
    extra = facts.pop("extra")
    rows = [(k, v) for k, v in {**facts, **extra}.items() if v not in (None, [], {})]
    show.table(f"{task.name}: {extra['title']}", ("key", "value"), rows)
    print(f"Try: peftzoo bench --method lora --task {task.name}")
