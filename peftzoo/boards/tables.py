"""Records -> tables. A table holds only comparable runs: same task, version, model, data source, protocol,
scored rows, training budget, measure version and device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from peftzoo.boards import ranks
from peftzoo.errors import UserError
from peftzoo.records import outcomes
from peftzoo.records.metric_terms import Sample
from peftzoo.records.schema import Record, Score, number
from peftzoo.tasks import task_files

BASELINE = "lora"
"""The method that all others are tested against, besides the best."""

DATA_FIELDS = ("id", "files", "cut", "train", "trained_on")
"""Fields of `record.data` that identify the rows, scored and trained on."""
BUDGET = ("steps", "batch_size", "recipe", "tuning")
"""The training budget; runs without training join tables of any budget."""
SHARED = ("task", "task_version", "task_digest", "model", "weights", "source", "data", "protocol", "average",
          "view", "rows", "max_length", "max_new_tokens", "prune", "metric", "precision", "measure_version",
          "device", *BUDGET)  # fmt: skip
"""Fields that are equal for all runs of a table; `weights` and `data` are digests of the record's fields."""


def frame(records: list[Record]) -> pd.DataFrame:
    """One row per run: the fields of `SHARED` and the measured columns."""
    runs = pd.DataFrame([_run_row(r) for r in records])
    numbers = ("score", "stderr", "unmerged", "trained", "step_ms", "memory_mib", "latency_ms", "lr")
    return runs.astype({k: float for k in numbers if k in runs})


def _run_row(r: Record) -> dict[str, Any]:
    train, memory = r.train_config | searched(r), r.memory.get("computed_total")
    latency = r.merged_latency or r.latency
    return {
        "task": r.task, "task_version": r.task_version, "task_digest": _digest_of_own_file(r),
        "model": r.model, "weights": digest(r.model_source),
        "source": _short_text(r.data.get("source")), "data": digest([r.data.get(k) for k in DATA_FIELDS]),
        "protocol": r.protocol, "average": r.average, "view": r.view,
        "rows": number(r.data.get("scored_rows")),
        "max_length": number(train.get("max_length")), "max_new_tokens": r.max_new_tokens,
        "prune": r.prune, "precision": _short_text(train.get("precision")),
        "measure_version": r.measure_version,
        "device": _short_text(r.environment.get("device")),
        "steps": number(train.get("steps")) or None, "batch_size": number(train.get("batch_size")),
        "recipe": recipe(r, searched(r)), "tuning": _search_budget(r),
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


def _digest_of_own_file(r: Record) -> str | None:
    """What tells task files of one name apart; None for those that ship with us, and for older records."""
    known = r.task_digest is None or task_files.is_built_in(r.task, r.task_digest)
    return None if known else _short_text(r.task_digest)[:8]


def recipe(r: Record, searched: dict[str, str]) -> str:
    """The training settings but steps, batch size and learning rate; those in `searched` as it has them."""
    train = r.train_config | searched
    text = f"{train.get('schedule')}, warm-up {train.get('warmup')}, clip {train.get('clip')}, "
    text += f"head lr {train.get('head_lr')}"
    text += ", loss on the prompt too" if train.get("train_on_prompt") else ""
    return text + _held_out(r)


def _held_out(r: Record) -> str:
    """What a run kept out of training, and whether it could stop early; nothing for most."""
    validation, own = r.data.get("validation"), r.validation or {}
    rows = validation.get("rows") if isinstance(validation, dict) else None
    counts = [number(n) for n in rows] if isinstance(rows, list) else []
    text = f", {integral(sum(counts))} rows held out" if counts and None not in counts else ""
    patience = _short_text(own.get("early_stop"))
    return text if patience is None else f"{text}, early stop {patience}"


def searched(r: Record) -> dict[str, str]:
    """The training settings that a hyperparameter search chose, each as the word "searched".

    Every method may have found another value, and they still share a table.
    """
    chosen = (r.tuning or {}).get("chosen")
    fields = chosen if isinstance(chosen, dict) else {}
    return {k: "searched" for k in fields if not k.startswith("set.")}


def _search_budget(r: Record) -> str | None:
    """The budget of the run's hyperparameter search as JSON, without the search space of each method."""
    if not r.tuning:
        return None
    budget = r.tuning.get("budget")
    budget = {k: v for k, v in budget.items() if k != "space"} if isinstance(budget, dict) else budget
    return json.dumps(budget, sort_keys=True)


def _short_text(value: Any) -> str | None:
    return None if value is None else str(value)[:80]


def digest(value: Any) -> str:
    """8 hexadecimal digits of a hash of the value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def tables(
    records: list[Record], baseline: str = BASELINE, warn: Callable[[str], None] = lambda _: None
) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Tables as pairs: the shared fields, and one row per method and configuration, best mean first.

    A run without training (0 steps) joins the tables of its task whatever their budget. `warn` is called with
    a message for each side file that cannot be used.
    """
    runs = frame([r for r in records if r.status == "ok"])
    if runs.empty:
        return []
    runs = runs.astype({k: object for k in SHARED}).where(runs.notna(), None)  # groups by None too
    runs = runs.drop_duplicates(["method", "id", "seed", "device"])
    trained, rest = runs["steps"].notna(), [k for k in SHARED if k not in BUDGET]
    untrained = {_nan_to_none(key): group.index for key, group in runs[~trained].groupby(rest, dropna=False)}
    joined = pd.Series(False, index=runs.index)
    groups = []
    for key, group in runs[trained].groupby(list(SHARED), dropna=False):
        matching = untrained.get(_nan_to_none(key[: len(rest)]), [])
        joined[matching] = True
        groups.append((_shared_fields(SHARED, key), pd.concat([group, runs.loc[matching]])))
    for key, group in runs[~trained & ~joined].groupby(rest, dropna=False):
        groups.append((_shared_fields(rest, key), group))
    return [(shared, _add_ranks(_summarize(group), baseline, warn)) for shared, group in groups]


def untrained_beside(records: list[Record], candidates: list[Record]) -> list[Record]:
    """Those of the candidates without training steps that would stand in a table with one of the records."""
    untrained = [r for r in candidates if r.status == "ok" and not number(r.train_config.get("steps"))]
    keys = [k for k in SHARED if k not in BUDGET]
    places = {tuple(_run_row(r)[k] for k in keys) for r in records if r.status == "ok"}
    return [r for r in untrained if tuple(_run_row(r)[k] for k in keys) in places]


def _add_ranks(table: pd.DataFrame, baseline: str, warn: Callable[[str], None]) -> pd.DataFrame:
    """The table with intervals of ranks, those that may be the best, and tests against the baseline.

    `attrs["verdict"]` says what holds for the whole table (`Verdict`).
    """
    entries = [_entry(records, warn) for records in table["records"]]
    base = next((i for i, m in enumerate(table["method"]) if m == baseline and entries[i].samples), None)
    downwards = bool(len(table)) and not _higher_is_better(table["records"].iloc[0])
    found = ranks.compare(entries, base, higher_is_better=not downwards)
    commonest = [_commonest(records) for records in table["records"]]
    columns = {
        "rank": [r and r[0] for r in found.ranks], "rank_high": [r and r[1] for r in found.ranks],
        "best": found.best, "p_base": found.p_base, "why": found.reasons,
        "broken": [_breakdowns(r, c) for r, c in zip(table["records"], commonest, strict=True)],
    }  # fmt: skip
    table = table.assign(**{k: pd.Series(v, index=table.index, dtype=object) for k, v in columns.items()})
    table.attrs["comparison"] = found
    table.attrs["verdict"] = Verdict.of(
        table, found, max((c for c in commonest if c is not None), default=None)
    )
    return table


@dataclass(frozen=True)
class Verdict:
    """What a table can say as a whole.

    `crowned`: the method that is the best beyond doubt, or None; `commonest`: the score of always giving the
    commonest answer; the others as in `ranks.Comparison`, `spread` between the best and worst ranked score.
    """

    crowned: str | None
    can_rank: bool
    detectable: float | None
    half_splits: float | None
    commonest: float | None
    spread: float | None
    sentence: str

    @classmethod
    def of(cls, table: pd.DataFrame, found: ranks.Comparison, commonest: float | None) -> Verdict:
        """The verdict on a table with its ranks."""
        ranked = table[table["rank"].notna()]
        best = ranked[ranked["best"].astype(bool)]["method"].tolist()
        spread = float(ranked["score"].max() - ranked["score"].min()) if len(ranked) else None
        beaten = commonest is not None and len(ranked) and ranked["score"].max() <= commonest
        crowned = best[0] if len(best) == 1 and len(ranked) > 1 and not beaten else None
        if len(ranked) < 2:
            sentence = "One entrant: nothing to rank." if len(table) == 1 else (
                f"Not ranked: it takes {ranks.MIN_SEEDS} seeds and outcomes per row of two methods at least."
            )  # fmt: skip
        elif beaten:
            sentence = f"Nothing here is better than the commonest answer ({commonest:.3f})."
        elif not spread:
            sentence = "All scores here are equal."
        elif not found.can_rank:
            sentence = (
                f"These runs cannot rank: a difference of {found.detectable:.3f} would be found in 80 of 100"
                f" such tables, and the scores lie within {spread:.3f}."
            )
        else:
            names = ", ".join(dict.fromkeys(best))
            sentence = f"The best: {names}." if crowned else f"May be the best ({len(best)}): {names}."
            sentence += f" A difference of {found.detectable:.3f} would be found in 80 of 100 such tables."
        if found.half_splits is not None:
            sentence += f" The order of a pair holds in {found.half_splits:.0%} of half-splits."
        return cls(crowned, found.can_rank, found.detectable, found.half_splits, commonest, spread, sentence)


def _entry(records: list[Record], warn: Callable[[str], None]) -> ranks.Entry:
    """The outcomes of one method and configuration."""
    by_seed, reason = {}, ""
    for record in records:
        try:
            scored = record.result is not None and record.result.value is not None
            if scored and (sample := outcomes.sample(record)) is not None:
                by_seed[record.seed] = sample
        except UserError as error:
            warn(str(error))
            reason = "outcomes that are not those of its score"
    untrained = not number(records[0].train_config.get("steps")) and records[0].view != "head"
    if untrained and by_seed and not reason and _all_alike(list(by_seed.values())):
        return ranks.Entry(
            dict([next(iter(by_seed.items()))]), fixed=True
        )  # seeds that repeat one run say nothing
    return ranks.Entry(by_seed, reason=reason)


def _all_alike(samples: list[Sample]) -> bool:
    """Whether all runs have the same outcomes."""
    first = samples[0]
    return all(s.rows == first.rows and (s.terms == first.terms).all() for s in samples)


def _higher_is_better(records: list[Record]) -> bool:
    """Whether larger scores are better, which is equal for all of a table."""
    return next((r.result.higher_is_better for r in records if r.result), True)


def _commonest(records: list[Record]) -> float | None:
    """The score of always giving the commonest answer; None where the outcomes do not tell."""
    try:
        return outcomes.commonest_answer(records[0])
    except UserError:
        return None


def _breakdowns(records: list[Record], commonest: float | None) -> int:
    """Trained runs that ended no better than the commonest answer, or above the loss that they began with."""
    trained = [r for r in records if number(r.train_config.get("steps"))]
    return sum(_is_no_better(r, commonest) or _ended_above(r) for r in trained)


def _is_no_better(r: Record, commonest: float | None) -> bool:
    value = r.result.value if r.result else None
    return commonest is not None and value is not None and value <= commonest


def _ended_above(r: Record) -> bool:
    """Whether the loss on held-out rows ended above where it began, or is not finite."""
    losses = r.validation or {}
    begin, end = number(losses.get("start_loss")), number(losses.get("loss"))
    return begin is not None and "loss" in losses and (end is None or end > begin)


def _shared_fields(names: Iterable[str], key: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(names, _nan_to_none(key), strict=True))


def _nan_to_none(key: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if pd.isna(value) else value for value in key)


def _summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method and configuration: mean (or median) score over seeds, best first."""
    rows = []
    for (method, _), group in runs.groupby(["method", "id"], sort=False):
        scores = group["score"].dropna()
        median = group["average"].iloc[0] == "median"
        rows.append({
            "method": method, "options": group["config"].iloc[0], "lr": group["lr"].iloc[0],
            "metric": group["metric"].iloc[0], "score": scores.median() if median else scores.mean(),
            "ci95": None if median else ranks.confidence_half_width(scores.tolist()), "seeds": len(scores),
            "stderr": group["stderr"].mean(), "unmerged": group["unmerged"].mean(),
            "trained": integral(group["trained"].iloc[0]), "step_ms": group["step_ms"].median(),
            "memory_mib": group["memory_mib"].median(), "latency_ms": group["latency_ms"].median(),
            "records": group["record"].tolist(),
        })  # fmt: skip
    upwards = _higher_is_better(runs["record"].tolist())
    return pd.DataFrame(rows).sort_values(
        "score", ascending=not upwards, na_position="last", ignore_index=True
    )


def averages(records: list[Record], members: Iterable[str]) -> list[dict[str, Any]]:
    """Unweighted mean score over the tasks of a task group, one row per method, configuration and seed.

    Each row also holds the number of scored tasks and the names of their metrics. Runs that differ only in
    the option `description` (the task's own text) belong to one configuration.
    """
    scores_by_run: dict[tuple[str, str, int], dict[str, Score]] = {}
    for r in records:
        if r.status == "ok" and r.result is not None and r.task in set(members):
            options = {k: v for k, v in r.method_config.items() if k != "description"}
            key = (r.method, json.dumps(options, sort_keys=True), r.seed)
            scores_by_run.setdefault(key, {}).setdefault(r.task, r.result)
    rows = []
    for (method, _, seed), scores in scores_by_run.items():
        values = [value for s in scores.values() if (value := number(s.value)) is not None]
        rows.append({
            "method": method, "seed": seed, "metric": ", ".join(sorted({s.metric for s in scores.values()})),
            "tasks": len(values), "score": sum(values) / len(values) if values else None,
        })  # fmt: skip
    return rows


def integral(value: Any) -> Any:
    """A float without a fraction as an int; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
