"""Published scores beside measured ones: records with the hyperparameters of a publication's preset."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from peftzoo.adapters import configure
from peftzoo.boards import ranks
from peftzoo.boards.formats import escape, markdown_table
from peftzoo.contract import registry
from peftzoo.errors import UserError
from peftzoo.records.published import Preset, presets
from peftzoo.records.schema import Record, number

COLUMNS = ("method", "model", "task", "preset", "paper", "here", "ci95", "seeds", "paper_params",
           "here_params", "source")  # fmt: skip


def rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One row per published score that has records with the same settings; its keys are `COLUMNS`.

    `here` is the mean over seeds, times 100 where the published score is above 1; `ci95` is half the t
    interval.
    """
    groups: dict[tuple[str, str, str, str], dict[int, Record]] = {}
    for r in records:
        if r.status == "ok" and r.result and number(r.result.value) is not None and _is_full_run(r):
            groups.setdefault((r.method, r.model, r.task, r.id), {}).setdefault(r.seed, r)
    compared = []
    for (method, model, task, _), by_seed in groups.items():
        runs = [*by_seed.values()]
        for name, preset, options in _presets_with_options(method, task):
            published = preset.scores.get(model, {}).get(task)
            if published is None or not _has_settings(runs[0], preset, options):
                continue
            scores = [r.result.value * (100 if abs(published) > 1 else 1) for r in runs]
            compared.append({
                "method": method, "model": model, "task": task, "preset": name, "paper": published,
                "here": sum(scores) / len(scores), "ci95": ranks.confidence_half_width(scores),
                "seeds": len(scores),
                "paper_params": preset.counts.get(model), "here_params": runs[0].trainable_params,
                "source": preset.source,
            })  # fmt: skip
    return compared


def _is_full_run(r: Record) -> bool:
    """Whether the run used real data, scored all rows of its split, and did not prune the model."""
    if r.data.get("source") not in ("hub", "mirror") or r.prune is not None:
        return False
    files = r.data.get("files")
    counts = [f.get("rows") for f in files.values() if isinstance(f, dict)] if isinstance(files, dict) else []
    return r.data.get("scored_rows") in counts


def _presets_with_options(method: str, task: str) -> list[tuple[str, Preset, dict[str, Any]]]:
    """The presets of a method as (name, preset, all options of the method for the task); empty if unknown."""
    if method not in registry.methods():
        return []
    cls = registry.get(method)
    result = []
    for name, preset in presets(cls).items():
        try:
            options = configure(cls, preset.options_for(task)).config.model_dump(mode="json")
        except UserError:  # some options need a value that only a run fills in
            continue
        result.append((name, preset, options))
    return result


def _has_settings(r: Record, preset: Preset, options: dict[str, Any]) -> bool:
    """Whether the run used these options and the preset's training settings (epochs counted as steps)."""
    if r.method_config != options:
        return False
    expected = preset.train_fields_for(r.task, {})
    epochs = expected.pop("epochs", None)
    if epochs is not None:
        train = r.data["files"].get("train")
        count = number(train.get("rows")) if isinstance(train, dict) else None
        size = number(r.train_config.get("batch_size"))
        if not count or not size:
            return False
        expected["steps"] = max(1, round(epochs * count / size))
    return bool(expected) and all(r.train_config.get(k) == v for k, v in expected.items())


def markdown(replications: list[dict[str, Any]]) -> str:
    """The rows as a Markdown section of the board; an empty string for no rows."""
    if not replications:
        return ""
    table = pd.DataFrame([{
        "method": r["method"], "model": r["model"], "task": r["task"], "paper": f"{r['paper']:g}",
        "here": f"{r['here']:.4g}", "+-95 %": "" if r["ci95"] is None else f"{r['ci95']:.2g}",
        "seeds": str(r["seeds"]),
        "parameters, paper": "" if r["paper_params"] is None else f"{r['paper_params']}",
        "parameters, here": "" if r["here_params"] is None else f"{r['here_params']:,}",
        "setting": r["preset"], "source": r["source"],
    } for r in replications]).map(escape)  # fmt: skip
    heading = "## Paper and here\n\nRuns with the setting of a publication, on all rows."
    return f"{heading}\n\n{markdown_table(table)}"
