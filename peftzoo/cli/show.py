"""`peftzoo show`: one method, task or group of tasks."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo show unilora")(show)


def show(name: str = typer.Argument(..., help="A method, a task or a group."), json: bool = output.JSON,
          plugin: list[str] = output.PLUGIN) -> None:  # fmt: skip
    """Show one method, one task, or one group of tasks.

    Of a method the equation, paper and options, of a task the prompt, metric and settings.
    """
    from peftzoo.contract import registry
    from peftzoo.errors import unknown
    from peftzoo.tasks import task_files

    output.load_plugins(plugin)
    if name in registry.methods() or ":" in name:
        _show_method(name, json, "".join(f" --plugin {file}" for file in plugin))
    elif name in task_files.groups():
        _show_group(name, task_files.groups()[name], json)
    elif name in task_files.tasks() or name.endswith((".yaml", ".yml")):
        _show_task(name, json)
    else:
        known = [*registry.methods(), *task_files.groups(), *task_files.tasks()]
        raise unknown("name", name, known, see="peftzoo list methods")


def _show_method(name: str, json: bool, files: str) -> None:
    """Print a method's card, options and presets; `files` are the options that load it."""
    from peftzoo.contract import registry
    from peftzoo.records import published

    cls = registry.get(name)
    text = cls.card or inspect.getdoc(inspect.getmodule(cls)) or ""
    options = [
        {"option": k, "default": _as_text(f.get_default(call_default_factory=True)), "meaning": f.description}
        for k, f in cls.Config.model_fields.items()
    ]
    presets = published.presets(cls)
    if json:
        facts = {
            k: getattr(cls, k) for k in ("name", "title", "paper", "family", "peft", "lr", "identity_at_init")
        }
        output.print_json({**facts, "mergeable": bool(cls.mergeable), "card": text, "options": options,
                      "presets": {k: p.model_dump(mode="json") for k, p in presets.items()}})  # fmt: skip
        return
    print(f"{name}: {cls.title}\n\n{text}\n")
    if options:
        output.print_table("Options (--set KEY=VALUE)", options[0], [o.values() for o in options])
    if presets:
        rows = [(k, _pairs(p.options), _pairs(p.train), p.source) for k, p in presets.items()]
        output.print_table(
            "Published settings (--preset NAME)", ("preset", "options", "training", "source"), rows
        )
    print(f"Learning rate: {cls.lr:g} by default.\n")
    output.next_step(f"peftzoo bench --method {name} --task gsm8k{files}")


def _pairs(settings: dict[str, Any]) -> str:
    """`key=value` for each setting."""
    return ", ".join(f"{k}={_as_text(v)}" for k, v in settings.items())


def _as_text(value: Any) -> Any:
    """A tuple as `a,b`; any other value unchanged."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _show_group(name: str, members: tuple[str, ...], json: bool) -> None:
    """Print the tasks of a group, and its settings if they are trained together."""
    from peftzoo.tasks import task_files

    about = (
        task_files.task_group(name).about.model_dump(mode="json")
        if task_files.expand([name]) == [name]
        else {}
    )
    if json:
        output.print_json({"group": name, "tasks": list(members), **about})
        return
    how = "trained together, one model for all" if about else "run one by one"
    print(f"{name}: {len(members)} tasks, {how}\n\n" + "\n".join(members))
    if rows := [(k, v) for k, v in about.items() if v not in (None, "", [], {})]:
        output.print_table("Together", ("key", "value"), rows)
    print()
    output.next_step(f"peftzoo bench --method lora --task {name}")


def _show_task(name: str, json: bool) -> None:
    """Print the task file of one task, with its defaults."""
    from peftzoo.tasks import task_files

    task = task_files.get(name)
    facts = task.model_dump(mode="json")
    if json:
        output.print_json(facts)
        return
    extra = facts.pop("extra")
    rows = [(k, v) for k, v in {**facts, **extra}.items() if v not in (None, [], {})]
    output.print_table(f"{task.name}: {extra['title']}", ("key", "value"), rows)
    output.next_step(f"peftzoo bench --method lora --task {task.name}")
