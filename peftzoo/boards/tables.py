"""Records -> tables. One table holds only runs that may be compared: same task, version, model, source,
protocol, scored rows, training budget, measure version and device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from peftzoo.boards import ranks
from peftzoo.errors import UserError
from peftzoo.records import outcomes
from peftzoo.records.schema import Record, Score, number

BASELINE = "lora"
"""The method that all others are tested against, besides the best."""

DATA_FIELDS = ("id", "files", "cut", "train", "trained_on")
"""What the record says of its rows, scored and trained on."""
BUDGET = ("steps", "batch_size", "recipe", "tuning")
SHARED = ("task", "task_version", "model", "weights", "source", "data", "protocol", "average", "view", "rows",
          "max_length", "max_new_tokens", "prune", "metric", "precision", "measure_version", "device",
          *BUDGET)  # fmt: skip
"""What runs of one table have in common; `weights` and `data` are short digests of what the record names."""


def frame(records: list[Record]) -> pd.DataFrame:
    """One row per run."""
    runs = pd.DataFrame([_row(r) for r in records])
    numbers = ("score", "stderr", "unmerged", "trained", "step_ms", "memory_mib", "latency_ms", "lr")
    return runs.astype({k: float for k in numbers if k in runs})


def _row(r: Record) -> dict[str, Any]:
    t, memory = r.train_config | _searched(r), r.memory.get("computed_total")
    latency = r.merged_latency or r.latency
    prompt = ", loss on the prompt too" if t.get("train_on_prompt") else ""
    return {
        "task": r.task, "task_version": r.task_version, "model": r.model, "weights": digest(r.model_source),
        "source": _word(r.data.get("source")), "data": digest([r.data.get(k) for k in DATA_FIELDS]),
        "protocol": r.protocol, "average": r.average, "view": r.view,
        "rows": number(r.data.get("scored_rows")),
        "max_length": number(t.get("max_length")), "max_new_tokens": r.max_new_tokens,
        "prune": r.prune, "precision": _word(t.get("precision")), "measure_version": r.measure_version,
        "device": _word(r.environment.get("device")),
        "steps": number(t.get("steps")) or None, "batch_size": number(t.get("batch_size")),
        "recipe": f"{t.get('schedule')}, warm-up {t.get('warmup')}, clip {t.get('clip')}, "
                  f"head lr {t.get('head_lr')}{prompt}",
        "tuning": _tuning(r),
        "method": r.method, "id": r.id, "seed": r.seed,
        "config": ", ".join(f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}"
                            for k, v in r.method_config.items()),
        "lr": number(r.train_config.get("lr")), "metric": r.result.metric if r.result else None,
        "score": r.result and number(r.result.value),
        "stderr": r.result and number(r.result.stderr), "record": r,
        "latency_ms": number(latency.get("token_ms", latency.get("forward_ms"))),
        "unmerged": number(r.score.value) if r.merged_score and r.score else None,
        "trained": r.trainable_params, "step_ms": number(r.step_time.get("median_ms")),
        "memory_mib": memory / 2**20 if memory else None,
    }  # fmt: skip


def _searched(r: Record) -> dict[str, str]:
    """The training settings that a search chose: each method has its own, and all share a table."""
    chosen = (r.tuning or {}).get("chosen")
    fields = chosen if isinstance(chosen, dict) else {}
    return {k: "searched" for k in fields if not k.startswith("set.")}


def _tuning(r: Record) -> str | None:
    """What a search was given; not where it looked, which is each method's own."""
    if not r.tuning:
        return None
    budget = r.tuning.get("budget")
    budget = {k: v for k, v in budget.items() if k != "space"} if isinstance(budget, dict) else budget
    return json.dumps(budget, sort_keys=True)


def _word(value: Any) -> str | None:
    return None if value is None else str(value)[:80]


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def tables(
    records: list[Record], baseline: str = BASELINE, complain: Callable[[str], None] = lambda _: None
) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Tables as (what the runs share, one row per method and configuration), best mean first.

    A run without training (0 steps) joins the tables of its task whatever their budget. `complain` is told of
    side files that cannot be used.
    """
    runs = frame([r for r in records if r.status == "ok"])
    if runs.empty:
        return []
    runs = runs.astype({k: object for k in SHARED}).where(runs.notna(), None)  # groups by None too
    runs = runs.drop_duplicates(["method", "id", "seed", "device"])
    trained, rest = runs["steps"].notna(), [k for k in SHARED if k not in BUDGET]
    alike = {_known(key): group.index for key, group in runs[~trained].groupby(rest, dropna=False)}
    joined = pd.Series(False, index=runs.index)
    found = []
    for key, group in runs[trained].groupby(list(SHARED), dropna=False):
        facts = _facts(SHARED, key)
        same = alike.get(_known(key[: len(rest)]), [])
        joined[same] = True
        found.append((facts, pd.concat([group, runs.loc[same]])))
    for key, group in runs[~trained & ~joined].groupby(rest, dropna=False):
        found.append((_facts(rest, key), group))
    return [(facts, _tested(_summary(group), baseline, complain)) for facts, group in found]


def _tested(table: pd.DataFrame, baseline: str, complain: Callable[[str], None]) -> pd.DataFrame:
    """The table with ranks, and p values against the best row and against the best row of the baseline."""
    runs = [_samples(records, complain) for records in table["records"]]
    fit = [len(r) >= ranks.SEEDS for r in runs]
    base = next((i for i, m in enumerate(table["method"]) if m == baseline and runs[i]), None)
    nothing = [None] * len(runs)
    more = {
        "rank": ranks.ranks(runs, fit),
        "p_best": ranks.against(runs, 0),
        "p_base": nothing if base is None else ranks.against(runs, base),
    }
    return table.assign(**{k: pd.Series(v, index=table.index, dtype=object) for k, v in more.items()})


def _samples(records: list[Record], complain: Callable[[str], None]) -> ranks.Runs:
    found = {}
    for record in records:
        try:
            known = record.result is not None and record.result.value is not None
            if known and (sample := outcomes.sample(record)) is not None:
                found[record.seed] = sample
        except UserError as error:
            complain(str(error))
    return found


def _facts(names: Iterable[str], key: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(names, _known(key), strict=True))


def _known(key: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if pd.isna(value) else value for value in key)


def _summary(runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (method, _), group in runs.groupby(["method", "id"], sort=False):
        scores = group["score"].dropna()
        median = group["average"].iloc[0] == "median"
        rows.append({
            "method": method, "options": group["config"].iloc[0], "lr": group["lr"].iloc[0],
            "metric": group["metric"].iloc[0], "score": scores.median() if median else scores.mean(),
            "ci95": None if median else ranks.interval(scores.tolist()), "seeds": len(scores),
            "stderr": group["stderr"].mean(), "unmerged": group["unmerged"].mean(),
            "trained": whole(group["trained"].iloc[0]), "step_ms": group["step_ms"].median(),
            "memory_mib": group["memory_mib"].median(), "latency_ms": group["latency_ms"].median(),
            "records": group["record"].tolist(),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("score", ascending=False, na_position="last", ignore_index=True)


def averages(records: list[Record], members: Iterable[str]) -> list[dict[str, Any]]:
    """Mean score over the tasks of a group, each task alike, per method, configuration and seed.

    Also the number of these tasks, and which metrics their scores are. A configuration is the same whatever
    the task's words.
    """
    alike: dict[tuple[str, str, int], dict[str, Score]] = {}
    for r in records:
        if r.status == "ok" and r.result is not None and r.task in set(members):
            options = {k: v for k, v in r.method_config.items() if k != "description"}
            key = (r.method, json.dumps(options, sort_keys=True), r.seed)
            alike.setdefault(key, {}).setdefault(r.task, r.result)
    found = []
    for (method, _, seed), scores in alike.items():
        known = [value for s in scores.values() if (value := number(s.value)) is not None]
        found.append({
            "method": method, "seed": seed, "metric": ", ".join(sorted({s.metric for s in scores.values()})),
            "tasks": len(known), "score": sum(known) / len(known) if known else None,
        })  # fmt: skip
    return found


def whole(value: Any) -> Any:
    """A float without a fraction as an int; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
