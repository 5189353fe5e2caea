"""Published scores beside ours: records whose setting is that of a publication."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from peftzoo.adapters import configure
from peftzoo.boards import ranks
from peftzoo.boards.formats import escape, grid
from peftzoo.contract import registry
from peftzoo.errors import UserError
from peftzoo.records.published import Preset, presets
from peftzoo.records.schema import Record, number

COLUMNS = ("method", "model", "task", "preset", "paper", "here", "ci95", "seeds", "paper_params",
           "here_params", "source")  # fmt: skip


def rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One row per published score that records with the same setting stand beside; `here` is times 100 where
    the printed score is above 1."""
    groups: dict[tuple[str, str, str, str], dict[int, Record]] = {}
    for r in records:
        if r.status == "ok" and r.result and number(r.result.value) is not None and _whole(r):
            groups.setdefault((r.method, r.model, r.task, r.id), {}).setdefault(r.seed, r)
    found = []
    for (method, model, task, _), seeds in groups.items():
        runs = [*seeds.values()]
        for name, preset, options in _settings(method, task):
            printed = preset.scores.get(model, {}).get(task)
            if printed is None or not _same(runs[0], preset, options):
                continue
            scores = [r.result.value * (100 if abs(printed) > 1 else 1) for r in runs]
            found.append({
                "method": method, "model": model, "task": task, "preset": name, "paper": printed,
                "here": sum(scores) / len(scores), "ci95": ranks.interval(scores), "seeds": len(scores),
                "paper_params": preset.counts.get(model), "here_params": runs[0].trainable_params,
                "source": preset.source,
            })  # fmt: skip
    return found


def _whole(r: Record) -> bool:
    """Real data, all rows of the scored split, nothing pruned."""
    if r.data.get("source") not in ("hub", "mirror") or r.prune is not None:
        return False
    files = r.data.get("files")
    counts = [f.get("rows") for f in files.values() if isinstance(f, dict)] if isinstance(files, dict) else []
    return r.data.get("scored_rows") in counts


def _settings(method: str, task: str) -> list[tuple[str, Preset, dict[str, Any]]]:
    """The publications of a method, each with the options that it asks for."""
    if method not in registry.methods():
        return []
    cls = registry.get(method)
    found = []
    for name, preset in presets(cls).items():
        try:
            options = configure(cls, preset.chosen(task)).config.model_dump(mode="json")
        except UserError:  # the publication's options need what a run fills in
            continue
        found.append((name, preset, options))
    return found


def _same(r: Record, preset: Preset, options: dict[str, Any]) -> bool:
    if r.method_config != options:
        return False
    wanted = preset.training(r.task, {})
    epochs = wanted.pop("epochs", None)
    if epochs is not None:
        train = r.data["files"].get("train")
        count = number(train.get("rows")) if isinstance(train, dict) else None
        size = number(r.train_config.get("batch_size"))
        if not count or not size:
            return False
        wanted["steps"] = max(1, round(epochs * count / size))
    return bool(wanted) and all(r.train_config.get(k) == v for k, v in wanted.items())


def markdown(found: list[dict[str, Any]]) -> str:
    """The rows as a section of the board; nothing for none."""
    if not found:
        return ""
    shown = pd.DataFrame([{
        "method": r["method"], "model": r["model"], "task": r["task"], "paper": f"{r['paper']:g}",
        "here": f"{r['here']:.4g}", "+-95 %": "" if r["ci95"] is None else f"{r['ci95']:.2g}",
        "seeds": str(r["seeds"]),
        "parameters, paper": "" if r["paper_params"] is None else f"{r['paper_params']}",
        "parameters, here": "" if r["here_params"] is None else f"{r['here_params']:,}",
        "setting": r["preset"], "source": r["source"],
    } for r in found]).map(escape)  # fmt: skip
    return f"## Paper and here\n\nRuns with the setting of a publication, on all rows.\n\n{grid(shown)}"
