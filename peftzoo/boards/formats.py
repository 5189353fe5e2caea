"""Tables of a board as Markdown, CSV and JSON. No text from a record can be more than text in any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from peftzoo.boards.tables import BASELINE, SHARED, digest, whole
from peftzoo.records import store

ABOUT = (
    "Mean over seeds; +-95 %: half the t interval of that mean; se: standard error over the scored rows, "
    "mean over seeds. Rank: the best and all that a paired test on the same rows and seeds does not tell "
    "apart from it share rank 1, and so on with the rest; fewer than 3 seeds, or no outcomes per row: not "
    "ranked. p: that test against the best row and against the baseline, Holm-corrected in the table "
    "(for right and wrong answers the exact sign-flip test, which for one seed is McNemar's; else a "
    "bootstrap). A method that can be merged is scored merged, unless a pack scored its runs together; "
    "unmerged: on the first rows only, as a check."
)


def title(facts: dict[str, Any]) -> str:
    head = f"{facts['task']} on {facts['model']} ({facts['source']} data, {facts['protocol']})"
    return head + (", median over seeds" if facts["average"] == "median" else "")


def conditions(facts: dict[str, Any]) -> str:
    """What else the runs of a table share, in a line."""
    told = ("task", "model", "source", "protocol", "metric", "average", "device")
    shown = {k: v for k, v in facts.items() if v is not None and k not in told}
    return ", ".join(f"{k.replace('_', ' ')} {whole(v)}" for k, v in shown.items())


def device(facts: dict[str, Any]) -> str:
    return f"Device: {facts['device']}. Times and memory compare within this table only."


def markdown(
    found: list[tuple[dict[str, Any], pd.DataFrame]], baseline: str = BASELINE, more: str = ""
) -> str:
    """All tables as one Markdown document."""
    parts = [f"# Board\n\n{ABOUT}", *([more] if more else [])]
    for facts, table in found:
        shown = pd.DataFrame({
            "rank": table["rank"].map(lambda v: _number(v, 0)), "method": table["method"].map(escape),
            escape(facts["metric"] or "score"): table["score"].map(lambda v: _number(v, 3)),
            "+-95 %": table["ci95"].map(lambda v: _number(v, 3)),
            "se": table["stderr"].map(lambda v: _number(v, 3)), "seeds": table["seeds"],
            "p best": table["p_best"].map(chance), f"p {escape(baseline)}": table["p_base"].map(chance),
            "unmerged": table["unmerged"].map(lambda v: _number(v, 3)),
            "trained": table["trained"].map(lambda v: "" if pd.isna(v) else f"{int(v):,}"),
            "step ms": table["step_ms"].map(lambda v: _number(v, 1)),
            "memory MiB": table["memory_mib"].map(lambda v: _number(v, 0)),
            "lr": table["lr"].map(lambda v: "" if pd.isna(v) else f"{v:g}"),
            "options": table["options"].map(escape),
        })  # fmt: skip
        text = (f"## {escape(title(facts))}", escape(conditions(facts)), escape(device(facts)), grid(shown))
        parts.append("\n\n".join(text))
    return "\n\n".join(parts) + "\n"


def grid(shown: pd.DataFrame) -> str:
    """A Markdown table of cells that are text already."""
    rows = [list(shown.columns), ["---"] * len(shown.columns), *shown.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(r)} |" for r in rows)


def chance(p: float | None) -> str:
    """A p value as text."""
    return "" if p is None or pd.isna(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def files(found: list[tuple[dict[str, Any], pd.DataFrame]]) -> dict[str, str]:
    """A CSV file per table, by name: what the runs share stands in every row."""
    made = {}
    for facts, table in found:
        words = "-".join(str(facts[k]) for k in ("task", "model", "source", "protocol"))
        facts = {k: facts.get(k) for k in SHARED}
        rows = table.drop(columns=["records", "metric"])
        whole = pd.concat([pd.DataFrame([facts] * len(rows)), rows], axis=1)
        name = f"{store.slug(words)}-{digest(facts)}.csv"
        made[name] = whole.map(_cell).to_csv(index=False, lineterminator="\n")
    return made


def is_table(file: Path) -> bool:
    """Whether the file is one that `files` made: by its columns."""
    with file.open("rb") as lines:
        return lines.readline(4096).startswith(",".join(SHARED).encode() + b",")


def _cell(value: Any) -> Any:
    """No text from a record is a formula to a spreadsheet program, or begins a row of its own."""
    if not isinstance(value, str):
        return whole(value)
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


def _number(value: Any, digits: int) -> str:
    return "" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def as_rows(found: list[tuple[dict[str, Any], pd.DataFrame]]) -> list[dict[str, Any]]:
    """The same as plain JSON."""

    def clean(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        return None if isinstance(value, float) and value != value else value

    return [
        {**{k: whole(clean(v)) for k, v in facts.items()},
         "table": [{k: clean(v) for k, v in row.items() if k != "records"}
                   for row in table.to_dict("records")]}
        for facts, table in found
    ]  # fmt: skip
