"""Records -> tables. One table holds only runs that may be compared: same task, version, model, source,
protocol, scored rows, training budget and measure version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import pandas as pd
from scipy import stats

from peftzoo.store import Record

BUDGET = ("steps", "batch_size", "recipe")
SHARED = ("task", "task_version", "model", "weights", "source", "data", "protocol", "average", "view", "rows",
          "max_length", "max_new_tokens", "prune", "metric", "precision", "measure_version", "device",
          *BUDGET)  # fmt: skip
"""What runs of one table have in common; `weights` and `data` are short digests of what the record names."""


def frame(records: list[Record]) -> pd.DataFrame:
    """One row per run."""
    runs = pd.DataFrame([_row(r) for r in records])
    numbers = ("score", "unmerged", "trained", "step_ms", "memory_mib", "lr")
    return runs.astype({k: float for k in numbers if k in runs})


def _row(r: Record) -> dict[str, Any]:
    t, memory = r.train_config, r.memory.get("computed_total")
    prompt = ", loss on the prompt too" if t.get("train_on_prompt") else ""
    return {
        "task": r.task, "task_version": r.task_version, "model": r.model, "weights": _digest(r.model_source),
        "source": _word(r.data.get("source")), "data": _digest([r.data.get("id"), r.data.get("files")]),
        "protocol": r.protocol, "average": r.average, "view": r.view,
        "rows": _real(r.data.get("scored_rows")),
        "max_length": _real(t.get("max_length")), "max_new_tokens": r.max_new_tokens,
        "prune": r.prune, "precision": _word(t.get("precision")), "measure_version": r.measure_version,
        "device": _word(r.environment.get("device")),
        "steps": _real(t.get("steps")) or None, "batch_size": _real(t.get("batch_size")),
        "recipe": f"{t.get('schedule')}, warm-up {t.get('warmup')}, clip {t.get('clip')}, "
                  f"head lr {t.get('head_lr')}{prompt}",
        "method": r.method, "id": r.id, "seed": r.seed,
        "config": ", ".join(f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}"
                            for k, v in r.method_config.items()),
        "lr": _real(t.get("lr")), "metric": r.result.metric if r.result else None,
        "score": r.result.value if r.result else None,
        "unmerged": r.score.value if r.merged_score and r.score else None,
        "trained": r.trainable_params, "step_ms": r.step_time.get("median_ms"),
        "memory_mib": memory / 2**20 if memory else None,
    }  # fmt: skip


def _word(value: Any) -> str | None:
    return None if value is None else str(value)[:80]


def _real(value: Any) -> float | None:
    """A number from a part of the record that has no schema."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e15 else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def tables(records: list[Record]) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Tables as (what the runs share, one row per method and configuration), best mean first.

    A run without training (0 steps) joins the tables of its task whatever their budget.
    """
    runs = frame([r for r in records if r.status == "ok"])
    if runs.empty:
        return []
    runs = runs.astype({k: object for k in SHARED}).where(runs.notna(), None)  # groups by None too
    runs = runs.drop_duplicates(["method", "id", "seed", "device"])
    trained, rest = runs["steps"].notna(), [k for k in SHARED if k not in BUDGET]
    joined = pd.Series(False, index=runs.index)
    found = []
    for key, group in runs[trained].groupby(list(SHARED), dropna=False):
        facts = _facts(SHARED, key)
        same = ~trained & (runs[rest].apply(tuple, axis=1) == tuple(facts[k] for k in rest))
        joined |= same
        found.append((facts, _summary(pd.concat([group, runs[same]]))))
    for key, group in runs[~trained & ~joined].groupby(rest, dropna=False):
        found.append((_facts(rest, key), _summary(group)))
    return found


def _facts(names: Iterable[str], key: tuple[Any, ...]) -> dict[str, Any]:
    return {name: None if pd.isna(value) else value for name, value in zip(names, key, strict=True)}


def _summary(runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (method, _), group in runs.groupby(["method", "id"], sort=False):
        scores = group["score"].dropna()
        median = group["average"].iloc[0] == "median"
        rows.append({
            "method": method, "options": group["config"].iloc[0], "lr": group["lr"].iloc[0],
            "metric": group["metric"].iloc[0], "score": scores.median() if median else scores.mean(),
            "ci95": None if median else interval(scores.tolist()), "seeds": len(scores),
            "unmerged": group["unmerged"].mean(),
            "trained": _plain(group["trained"].iloc[0]), "step_ms": group["step_ms"].median(),
            "memory_mib": group["memory_mib"].median(),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("score", ascending=False, na_position="last", ignore_index=True)


def averages(records: list[Record], members: Iterable[str]) -> list[dict[str, Any]]:
    """Mean score over the tasks of a group, each task alike, per method, configuration, seed and metric, and
    the number of these tasks."""
    runs = frame([r for r in records if r.status == "ok" and r.result is not None and r.task in set(members)])
    if runs.empty:
        return []
    keys = ["method", "config", "seed", "metric"]
    found = runs.groupby(keys, sort=False, dropna=False)["score"].agg(["mean", "count"]).reset_index()
    return [
        {"method": r["method"], "seed": int(r["seed"]), "metric": r["metric"], "tasks": int(r["count"]),
         "score": None if pd.isna(r["mean"]) else float(r["mean"])}
        for r in found.to_dict("records")
    ]  # fmt: skip


def interval(scores: list[float]) -> float | None:
    """Half-width of the 95 % t interval of the mean over seeds; None for fewer than two."""
    if len(scores) < 2:
        return None
    return float(stats.sem(scores) * stats.t.ppf(0.975, len(scores) - 1))


def markdown(found: list[tuple[dict[str, Any], pd.DataFrame]]) -> str:
    """All tables as one Markdown document."""
    parts = [
        "# Board\n\nMean over seeds; the interval is the 95 % t interval of that mean. A method that "
        "can be merged is scored merged; unmerged: on the first rows only, as a check."
    ]
    for facts, table in found:
        metric = escape(facts["metric"] or "score")
        head = f"## {facts['task']} on {facts['model']} ({facts['source']} data, {facts['protocol']})"
        head += ", median over seeds" if facts["average"] == "median" else ""
        line = ", ".join(
            f"{k.replace('_', ' ')} {_plain(v)}"
            for k, v in facts.items()
            if v is not None and k not in ("task", "model", "source", "protocol", "metric", "average")
        )
        shown = pd.DataFrame({
            "method": table["method"].map(escape), metric: table["score"].map(lambda v: _number(v, 3)),
            "+-95 %": table["ci95"].map(lambda v: _number(v, 3)), "seeds": table["seeds"],
            "unmerged": table["unmerged"].map(lambda v: _number(v, 3)),
            "trained": table["trained"].map(lambda v: "" if pd.isna(v) else f"{int(v):,}"),
            "step ms": table["step_ms"].map(lambda v: _number(v, 1)),
            "memory MiB": table["memory_mib"].map(lambda v: _number(v, 0)),
            "lr": table["lr"].map(lambda v: "" if pd.isna(v) else f"{v:g}"),
            "options": table["options"].map(escape),
        })  # fmt: skip
        rows = [list(shown.columns), ["---"] * len(shown.columns), *shown.astype(str).to_numpy().tolist()]
        parts.append(
            f"{escape(head)}\n\n{escape(line)}\n\n" + "\n".join(f"| {' | '.join(r)} |" for r in rows)
        )
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text from a record, so that it can neither break a Markdown table nor carry HTML."""
    text = "".join(c if c.isprintable() else " " for c in text)
    for bad, good in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "&#124;"),
        ("`", "'"),
        ("[", "&#91;"),
    ):
        text = text.replace(bad, good)
    return text


def _number(value: Any, digits: int) -> str:
    return "" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_rows(found: list[tuple[dict[str, Any], pd.DataFrame]]) -> list[dict[str, Any]]:
    """The same as plain JSON."""

    def clean(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return None if isinstance(value, float) and value != value else value

    return [
        {**{k: _plain(clean(v)) for k, v in facts.items()},
         "table": [{k: clean(v) for k, v in row.items()} for row in table.to_dict("records")]}
        for facts, table in found
    ]  # fmt: skip
