"""Tuned beside default: what a search of the learning rate changes, method by method.

Runs after a search stand in a table of their own. Beside each of them belong the runs of the same method and
options with its default rate, whose table is equal in all else. Where both have the same seeds, the gain has
the interval of a paired t test, otherwise that of Welch's. How forgiving a method is says the range of rates
around the best whose mean held-out loss is at most one standard error (over seeds) above the best one's.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from peftzoo.boards import ranks
from peftzoo.boards import tables as board
from peftzoo.records.schema import Record, number

Tables = list[tuple[dict[str, Any], pd.DataFrame]]

CONFIDENCE = 0.95
MIN_METHODS = 3
"""Two rankings of fewer methods are not compared."""
OF_METHODS = ("default_lr", "default_score", "default_seeds", "default_broken", "gain", "gain_low",
              "gain_high", "lr_low", "lr_high", "lr_decades", "lr_at_least")  # fmt: skip
"""Columns that a table of tuned runs has more than others; fields of `Row`."""
OF_TABLES = ("kendall_tau", "spread_ratio")
"""Columns that say the same in each of its rows; fields of `Effect`."""


@dataclass(frozen=True)
class Rate:
    """What a search found at one learning rate in one of its rounds: the held-out loss of each seed."""

    lr: float
    steps: float
    losses: list[float | None]
    breakdowns: int

    @property
    def mean(self) -> float | None:
        """Over seeds; None where a seed's loss is not finite."""
        return None if None in self.losses or not self.losses else statistics.fmean(self.losses)

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean over seeds; None for fewer than two."""
        if self.mean is None or len(self.losses) < 2:
            return None
        return statistics.stdev(self.losses) / len(self.losses) ** 0.5


@dataclass(frozen=True)
class Row:
    """A method, tuned and with its defaults; None for what is not known.

    A gain above 0 is an improvement, whatever the metric. `at` is the row of the table, `runs` and
    `default_runs` count all runs, `why` says why there is no default, `rates` are those that were tried.
    """

    at: int
    method: str
    label: str
    lr: float | None
    score: float | None
    runs: int
    broken: int
    rates: list[Rate]
    start_loss: float | None
    default_lr: float | None = None
    default_score: float | None = None
    default_seeds: int | None = None
    default_runs: int | None = None
    default_broken: int | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    paired: bool | None = None
    lr_low: float | None = None
    lr_high: float | None = None
    lr_decades: float | None = None
    lr_at_least: bool | None = None
    why: str = ""


@dataclass(frozen=True)
class Effect:
    """What tuning changes in a table: its rows, and both rankings compared over `methods` of them.

    `spread_ratio`: the standard deviation of the tuned scores over that of the scores at the defaults.
    """

    rows: list[Row]
    methods: int
    kendall_tau: float | None
    spread_ratio: float | None
    sentence: str


def beside_default(tables: Tables) -> Tables:
    """The tables; those of tuned runs with the columns `OF_METHODS`, `OF_TABLES` and `attrs["tuning"]`."""
    return [(shared, _with_effect(shared, table, tables)) for shared, table in tables]


def _with_effect(shared: dict[str, Any], table: pd.DataFrame, tables: Tables) -> pd.DataFrame:
    tuned = [i for i, records in enumerate(table["records"]) if records[0].tuning]
    if not tuned:
        return table
    hidden = board.searched(table["records"].iloc[tuned[0]][0])
    partners = [t for other, t in tables if _is_partner(other, shared)]
    candidates = [
        row
        for t in partners
        for row in t.to_dict("records")
        if _is_default(row["records"][0], shared, hidden)
    ]
    several = {m for m, n in Counter(table["method"].iloc[tuned]).items() if n > 1}
    rows = [_row(i, table.iloc[i], candidates, several) for i in tuned]
    effect = _effect(rows)
    columns: dict[str, list[Any]] = {k: [None] * len(table) for k in (*OF_METHODS, *OF_TABLES)}
    for row in rows:
        for key in columns:
            columns[key][row.at] = getattr(effect if key in OF_TABLES else row, key)
    result = table.assign(**{k: pd.Series(v, index=table.index, dtype=object) for k, v in columns.items()})
    result.attrs["tuning"] = effect
    return result


# -- which runs belong beside each other ----------------------------------------------------------------


def _is_partner(other: dict[str, Any], shared: dict[str, Any]) -> bool:
    """Whether a table of runs that were not tuned is equal in all that a search does not change."""
    same = (k for k in board.SHARED if k not in ("tuning", "recipe"))
    return other.get("tuning") is None and all(other.get(k) == shared.get(k) for k in same)


def _is_default(record: Record, shared: dict[str, Any], hidden: dict[str, str]) -> bool:
    """Whether its settings are the table's, but for those that the search chose."""
    trained = number(record.train_config.get("steps"))
    return bool(trained) and board.recipe(record, hidden) == shared.get("recipe")


def _defaults_of(record: Record, candidates: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """The row with the defaults of a tuned run, or None and why there is none."""
    chosen, lr = _dict(record.tuning.get("chosen")), _default_lr(record)
    fits = [
        row for row in candidates
        if row["method"] == record.method and _options(row["records"][0], chosen) == _options(record, chosen)
        and (lr is None or (row["lr"] == row["lr"] and math.isclose(row["lr"], lr, rel_tol=1e-6)))
    ]  # fmt: skip
    if len(fits) > 1:
        settings = _settings(record, chosen)
        fits = [row for row in fits if _settings(row["records"][0], chosen) == settings] or fits
    if len(fits) == 1:
        return fits[0], ""
    return None, "no run with the defaults" if not fits else "several settings that may be the default"


def _options(record: Record, chosen: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.method_config.items() if f"set.{k}" not in chosen}


def _settings(record: Record, chosen: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.train_config.items() if k not in chosen and k != "lr"}


def _default_lr(record: Record) -> float | None:
    """The rate that the method has without the search; None where the search does not say."""
    if "lr" in _dict(record.tuning.get("chosen")):
        return number(_dict(record.tuning.get("default")).get("lr"))
    return number(record.train_config.get("lr"))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# -- one method -----------------------------------------------------------------------------------------


def _row(at: int, tuned: pd.Series, candidates: list[dict[str, Any]], several: set[str]) -> Row:
    record: Record = tuned["records"][0]
    label = f"{record.method} ({tuned['options']})" if record.method in several else record.method
    rates = tried(record)
    facts: dict[str, Any] = {"default_lr": _default_lr(record)}
    default, facts["why"] = _defaults_of(record, candidates)
    if default is not None:
        facts |= {
            "default_lr": default["lr"], "default_score": _known(default["score"]),
            "default_seeds": int(default["seeds"]), "default_runs": len(default["records"]),
            "default_broken": int(default["broken"]),
        }  # fmt: skip
        facts |= _gain(default["records"], tuned["records"])
    if (found := forgiving(rates)) is not None:
        low, high, facts["lr_at_least"] = found
        facts |= {"lr_low": low, "lr_high": high, "lr_decades": round(math.log10(high / low), 4)}
    return Row(
        at, record.method, label, _known(tuned["lr"]), _known(tuned["score"]), len(tuned["records"]),
        int(tuned["broken"]), rates, number(record.tuning.get("start_loss")), **facts,
    )  # fmt: skip


def _known(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def _gain(default: list[Record], tuned: list[Record]) -> dict[str, Any]:
    """Gain, the ends of its interval, and whether it is paired by seed."""
    before, after = _by_seed(default), _by_seed(tuned)
    if not before or not after:
        return {}
    if tuned[0].average == "median":
        gain = statistics.median(after.values()) - statistics.median(before.values())
        low = high = paired = None
    else:
        gain = statistics.fmean(after.values()) - statistics.fmean(before.values())
        low, high, paired = interval(before, after)
    if not tuned[0].result.higher_is_better:
        gain, low, high = -gain, None if high is None else -high, None if low is None else -low
    return {"gain": gain, "gain_low": low, "gain_high": high, "paired": paired}


def _by_seed(records: list[Record]) -> dict[int, float]:
    scores = {r.seed: number(r.result.value) for r in records if r.result}
    return {seed: value for seed, value in sorted(scores.items()) if value is not None}


def interval(
    before: dict[int, float], after: dict[int, float]
) -> tuple[float | None, float | None, bool | None]:
    """The 95 % interval of the mean of `after` less that of `before`, by seed; and whether it is paired.

    None where a side has fewer than two seeds.
    """
    if min(len(before), len(after)) < 2:
        return None, None, None
    paired = before.keys() == after.keys()
    a, b = np.array([after[s] for s in sorted(after)]), np.array([before[s] for s in sorted(before)])
    spread = np.ptp(a - b) if paired else max(np.ptp(a), np.ptp(b))
    if spread <= 1e-12 * max(np.abs(a).max(), np.abs(b).max()):  # scipy divides by it
        return float(a.mean() - b.mean()), float(a.mean() - b.mean()), paired
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one side may be constant
        test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return float(low), float(high), paired


def tried(record: Record) -> list[Rate]:
    """The learning rates that the search of a run tried; [] where it searched other values too."""
    found = _dict(record.tuning).get("tried")
    rates = []
    for entry in found if isinstance(found, list) else []:
        values, losses = _dict(_dict(entry).get("values")), _dict(entry).get("losses")
        lr, steps = number(values.get("lr")), number(_dict(entry).get("steps"))
        if values.keys() != {"lr"} or not lr or lr < 0 or steps is None or not isinstance(losses, list):
            return []
        breakdowns = int(number(entry.get("breakdowns")) or 0)
        rates.append(Rate(lr, steps, [number(v) for v in losses], breakdowns))
    return rates


def last_round(rates: Sequence[Rate]) -> dict[float, Rate]:
    """The rates that were compared over at least three seeds and all steps, by rate, lowest first."""
    compared = [r for r in rates if len(r.losses) >= ranks.MIN_SEEDS]
    steps = max((r.steps for r in compared), default=0)
    return {r.lr: r for r in sorted(compared, key=lambda r: r.lr) if r.steps == steps}


def forgiving(rates: Sequence[Rate]) -> tuple[float, float, bool] | None:
    """The lowest and highest rate of the range around the best within one standard error of its mean loss.

    And whether it may be wider: it ends where the next rate was not compared over three seeds and all steps.
    None where no rate was, or every one breaks down.
    """
    compared = last_round(rates)
    sound = {lr: r for lr, r in compared.items() if r.mean is not None and not r.breakdowns}
    if not sound:
        return None
    best = min(sound.values(), key=lambda r: r.mean)
    limit = best.mean + best.stderr
    ends, may_be_wider, all_rates = [], False, sorted({r.lr for r in rates})
    for onwards in (all_rates[::-1], all_rates):
        end = best.lr
        for lr in onwards[onwards.index(best.lr) + 1 :]:
            if lr not in sound or sound[lr].mean > limit:
                may_be_wider |= lr not in compared
                break
            end = lr
        else:
            may_be_wider = True
        ends.append(end)
    return ends[0], ends[1], may_be_wider


# -- all methods ----------------------------------------------------------------------------------------


def _effect(rows: list[Row]) -> Effect:
    both = [(r.default_score, r.score) for r in rows if None not in (r.default_score, r.score)]
    tau = ratio = None
    if len(both) >= MIN_METHODS:
        before, after = (np.array(side) for side in zip(*both, strict=True))
        if np.ptp(before) and np.ptp(after):
            tau = float(stats.kendalltau(before, after).statistic)
        ratio = float(after.std(ddof=1) / before.std(ddof=1)) if np.ptp(before) else None
    return Effect(rows, len(both), tau, ratio, _sentence(rows, len(both), tau, ratio))


def _sentence(rows: list[Row], both: int, tau: float | None, ratio: float | None) -> str:
    if not both:
        return (
            "No runs with the defaults and otherwise the same settings are on record, so no gain is known: "
            "peftzoo bench makes them."
        )
    text = f"{both} of {len(rows)} settings have runs with their defaults too"
    if both < MIN_METHODS:
        text += f"; it takes {MIN_METHODS} to compare the rankings."
    elif tau is None:
        text += "; all scores of one side are equal, so the rankings do not compare."
    else:
        text += f". Kendall's tau between the ranking with the defaults and the tuned one is {tau:.2f}."
    if ratio is not None:
        text += f" Tuned, the scores spread {ratio:.2f} times as wide (standard deviation over methods)."
    beside = [r for r in rows if r.default_runs]
    default, tuned = sum(r.default_broken for r in beside), sum(r.broken for r in rows)
    if default or tuned:
        text += (
            f" {default} of {sum(r.default_runs for r in beside)} runs broke down with the defaults, "
            f"{tuned} of {sum(r.runs for r in rows)} tuned."
        )
    return text


def as_dict(effect: Effect) -> dict[str, Any]:
    """For JSON: what holds for the whole table, and the rates that were tried."""
    losses = [
        {"method": row.method, "label": row.label, "rates": [asdict(rate) for rate in row.rates]}
        for row in effect.rows
        if row.rates
    ]
    facts = {k: v for k, v in asdict(effect).items() if k != "rows"}
    return facts | {"losses": losses}
