"""Tables of a board as Markdown, CSV and JSON. Text from a record is escaped in each of them: it cannot add
markup, cells, rows or spreadsheet formulas."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from peftzoo.boards import tuning
from peftzoo.boards.tables import BASELINE, SHARED, digest, integral
from peftzoo.records import store

ABOUT = (
    "Mean over seeds; +-95 %: half the t interval of that mean; se: standard error over the scored rows, "
    "mean over seeds. Rank: from and to, with 95 % confidence for the whole table, seeds and rows both "
    "taken as drawn at random (all pairs by the studentised range; the rule, its level and its power: "
    "results/ranks.md); * may be the best: nothing here is significantly better. No rank: fewer than 3 "
    "seeds, or outcomes per row that are missing, and the last column says which. p: t test of the "
    "difference from the baseline with the same variances, Holm-corrected. broken: runs that ended no "
    "better than the commonest answer, or with a higher loss on held-out rows than they began with; they "
    "count in the mean. A method that can be merged is scored "
    "merged, unless a pack scored its runs together; unmerged: on the first rows only, as a check."
)

ABOUT_TUNED = (
    "Tuned beside default: with the values that a search chose by the loss on held-out training rows, and "
    "with the method's defaults, in runs that are equal otherwise. Gain: how much better the tuned score "
    "is, with its 95 % interval (a paired t test where both have the same seeds, else Welch's). "
    "Forgiving: the rates around the best whose mean held-out loss is at most one standard error (over "
    "seeds) above the best one's, and the width of that range in powers of ten; at least so wide where "
    "the next rate was not tried as long and as often."
)


def title(shared: dict[str, Any]) -> str:
    """The heading of a table: task, model, data source and protocol, from the fields its runs share."""
    text = f"{shared['task']} on {shared['model']} ({shared['source']} data, {shared['protocol']})"
    return text + (", median over seeds" if shared["average"] == "median" else "")


def conditions(shared: dict[str, Any]) -> str:
    """The shared fields that `title`, `device` and the column of the metric do not show, on one line."""
    shown_elsewhere = ("task", "model", "source", "protocol", "metric", "average", "device")
    rest = {k: v for k, v in shared.items() if v is not None and k not in shown_elsewhere}
    return ", ".join(f"{k.replace('_', ' ')} {integral(v)}" for k, v in rest.items())


def device(shared: dict[str, Any]) -> str:
    """The device of a table's runs, with the note that times and memory compare only within the table."""
    return f"Device: {shared['device']}. Times and memory compare within this table only."


def markdown(
    tables: list[tuple[dict[str, Any], pd.DataFrame]], baseline: str = BASELINE, preface: str = ""
) -> str:
    """All tables as one Markdown document; `preface` is a section before them."""
    about = [ABOUT, *([ABOUT_TUNED] if any("tuning" in t.attrs for _, t in tables) else [])]
    sections = ["\n\n".join(["# Board", *about]), *([preface] if preface else [])]
    for shared, table in tables:
        cells = pd.DataFrame({
            "rank": rank_intervals(table), "method": table["method"].map(escape),
            escape(shared["metric"] or "score"): table["score"].map(lambda v: _fixed(v, 3)),
            "+-95 %": table["ci95"].map(lambda v: _fixed(v, 3)),
            "se": table["stderr"].map(lambda v: _fixed(v, 3)), "seeds": table["seeds"],
            f"p {escape(baseline)}": table["p_base"].map(p_value),
            "broken": broken(table),
            "unmerged": table["unmerged"].map(lambda v: _fixed(v, 3)),
            "trained": table["trained"].map(lambda v: "" if pd.isna(v) else f"{int(v):,}"),
            "step ms": table["step_ms"].map(lambda v: _fixed(v, 1)),
            "memory MiB": table["memory_mib"].map(lambda v: _fixed(v, 0)),
            "lr": table["lr"].map(lambda v: "" if pd.isna(v) else f"{v:g}"),
            "options": table["options"].map(escape), "not ranked": table["why"].map(escape),
        })  # fmt: skip
        cells = cells.drop(columns=[c for c in ("broken", "not ranked") if not cells[c].astype(bool).any()])
        heading = f"## {escape(title(shared))}"
        notes = [f"**{escape(table.attrs['verdict'].sentence)}**", escape(conditions(shared)),
                 escape(device(shared))]  # fmt: skip
        sections.append("\n\n".join([heading, *notes, markdown_table(cells), *_tuned(table, shared)]))
    return "\n\n".join(sections) + "\n"


def _tuned(table: pd.DataFrame, shared: dict[str, Any]) -> list[str]:
    """What tuning changes, as a sentence and a table; nothing for runs that were not tuned."""
    effect: tuning.Effect | None = table.attrs.get("tuning")
    if effect is None:
        return []
    metric = shared["metric"] or "score"
    cells = pd.DataFrame([
        {
            "method": escape(r.label), f"{escape(metric)}, default": _fixed(r.default_score, 3),
            "tuned": _fixed(r.score, 3), "gain": signed(r.gain), "95 %": gain_interval(r),
            "lr, default": _rate(r.default_lr), "tuned lr": _rate(r.lr), "forgiving": rate_range(r),
            "powers of ten": decades(r), "broken, default": share(r.default_broken, r.default_runs),
            "broken, tuned": share(r.broken, r.runs), "no gain": r.why,
        }
        for r in effect.rows
    ])  # fmt: skip
    optional = ("broken, default", "broken, tuned", "no gain")
    cells = cells.drop(columns=[c for c in optional if not cells[c].astype(bool).any()])
    return ["### Tuned beside default", f"**{escape(effect.sentence)}**", markdown_table(cells)]


def signed(value: float | None) -> str:
    """A gain with its sign."""
    return "" if value is None else f"{value:+.3f}"


def gain_interval(row: tuning.Row) -> str:
    """The interval of a gain: `+0.010 to +0.030`."""
    return "" if row.gain_low is None else f"{signed(row.gain_low)} to {signed(row.gain_high)}"


def rate_range(row: tuning.Row) -> str:
    """The range of rates within one standard error of the best: `0.001 to 0.01`, or the only one."""
    if row.lr_low is None:
        return ""
    return _rate(row.lr_low) + ("" if row.lr_low == row.lr_high else f" to {_rate(row.lr_high)}")


def decades(row: tuning.Row) -> str:
    """The width of that range in powers of ten: `0.5`, `at least 1.0`."""
    if row.lr_decades is None:
        return ""
    return ("at least " if row.lr_at_least else "") + f"{row.lr_decades:.1f}"


def share(part: int | None, total: int | None) -> str:
    """`2 of 10`; nothing for none."""
    return f"{part} of {total}" if part else ""


def broken(table: pd.DataFrame) -> list[str]:
    """`2 of 10` per row: of its runs, those that broke down."""
    return [share(n, len(records)) for n, records in zip(table["broken"], table["records"], strict=True)]


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def rank_intervals(table: pd.DataFrame) -> list[str]:
    """`1-4*` per row: the first and last possible rank, with a star for what may be the best."""
    return [
        "" if low is None else f"{low}{f'-{high}' if high > low else ''}{'*' if best else ''}"
        for low, high, best in zip(table["rank"], table["rank_high"], table["best"], strict=True)
    ]


def markdown_table(cells: pd.DataFrame) -> str:
    """A Markdown table; the cells are escaped already."""
    rows = [list(cells.columns), ["---"] * len(cells.columns), *cells.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(r)} |" for r in rows)


def p_value(p: float | None) -> str:
    """A p value as text: 3 decimals, "<0.001", or nothing for None and NaN."""
    return "" if p is None or pd.isna(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def files(tables: list[tuple[dict[str, Any], pd.DataFrame]]) -> dict[str, str]:
    """A CSV file per table: file name -> text. Every row repeats the shared fields."""
    csv_files = {}
    for table_fields, table in tables:
        title_words = "-".join(str(table_fields[k]) for k in ("task", "model", "source", "protocol"))
        shared = {k: table_fields.get(k) for k in SHARED}
        rows = table.drop(columns=["records", "metric"])
        full = pd.concat([pd.DataFrame([shared] * len(rows)), rows], axis=1)
        named = {
            k: v for k, v in shared.items() if k != "task_digest" or v
        }  # as it was before there were any
        name = f"{store.slug(title_words)}-{digest(named)}.csv"
        csv_files[name] = full.map(_csv_cell).to_csv(index=False, lineterminator="\n")
    return csv_files


def is_table(file: Path) -> bool:
    """Whether `files` wrote this file, judged by its first columns."""
    with file.open("rb") as lines:
        return lines.readline(4096).startswith(",".join(SHARED).encode() + b",")


def _csv_cell(value: Any) -> Any:
    """A cell whose text a spreadsheet program takes neither for a formula nor for a new row."""
    if not isinstance(value, str):
        return integral(value)
    text = printable(value)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") else text


def printable(text: str) -> str:
    """The text with a space for each control character."""
    return "".join(c if c.isprintable() else " " for c in text)


def escape(text: str) -> str:
    """Text from a record, so that it can neither break a Markdown table nor carry HTML."""
    text = printable(text)
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


def _fixed(value: Any, digits: int) -> str:
    return "" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def _verdict(table: pd.DataFrame) -> dict[str, Any]:
    """What a table says as a whole; empty for a part of a table."""
    verdict, effect = table.attrs.get("verdict"), table.attrs.get("tuning")
    facts = {} if verdict is None else {"verdict": asdict(verdict)}
    return facts | ({} if effect is None else {"tuning_effect": tuning.as_dict(effect)})


def as_rows(tables: list[tuple[dict[str, Any], pd.DataFrame]]) -> list[dict[str, Any]]:
    """The tables as plain JSON: one object per table with the shared fields and, under `table`, its rows."""

    def clean(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return None if isinstance(value, float) and value != value else value

    return [
        {**{k: integral(clean(v)) for k, v in shared.items()}, **_verdict(table),
         "table": [{k: clean(v) for k, v in row.items() if k != "records"}
                   for row in table.to_dict("records")]}
        for shared, table in tables
    ]  # fmt: skip
