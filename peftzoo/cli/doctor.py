"""`peftzoo doctor`: the facts about this machine that a bug report needs."""

from __future__ import annotations

import os

import typer

from peftzoo.cli import output


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: peftzoo doctor --json")(doctor)


def doctor(json: bool = output.JSON) -> None:
    """Show device, versions, Hub, caches and data mirror."""
    from peftzoo import models
    from peftzoo.contract import registry
    from peftzoo.measuring import counters
    from peftzoo.models import hub
    from peftzoo.tasks import task_files
    from peftzoo.training.config import auto_precision

    facts = counters.environment()
    versions = facts.pop("versions")
    facts |= {
        "precision auto": auto_precision(),
        "Hub": "offline by HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") == "1"
        else ("reachable" if hub.answers("openai-community/gpt2") else "not reachable"),
        "cache (PEFTZOO_HOME)": str(models.home()),
        "models here": ", ".join(m["name"] for m in models.known() if m["where"] == "on this machine")
        or "only embedded",
        "data mirror (PEFTZOO_DATA)": os.environ.get("PEFTZOO_DATA", "not set"),
        "methods": len(registry.methods()),
        "tasks": len(task_files.tasks()),
    }  # fmt: skip
    if json:
        output.print_json({"name": "doctor", "status": "ok", **facts, "versions": versions})
        return
    output.print_table("peftzoo doctor", ("what", "found"), [*facts.items(), *versions.items()])
    output.next_step("put this, and the command that failed, into a bug report")
