"""Records -> a folder of static pages: no server, nothing from elsewhere; all text is autoescaped."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from peftzoo.adapters import write_atomically
from peftzoo.boards import formats, pareto
from peftzoo.boards import tables as board
from peftzoo.contract import registry
from peftzoo.errors import UserError
from peftzoo.records import published, store
from peftzoo.records.schema import Record

AXES = {"trained": "trainable parameters", "memory_mib": "training memory, MiB (computed)",
        "step_ms": "step time, ms", "latency_ms": "latency, ms per token or pass"}  # fmt: skip
MARK = '<meta name="generator" content="peftzoo board">'
CURVES = 24
"""Learning curves on one page, at most."""
_JSON = json.JSONEncoder(ensure_ascii=False)
_FOLDER = Path(__file__).parent.parent / "assets" / "site"
Tables = list[tuple[dict[str, Any], pd.DataFrame]]


def write(folder: Path, records: list[Record], tables: Tables, papers: list[dict[str, Any]],
          baseline: str = board.BASELINE, notes: Iterable[str] = ()) -> int:  # fmt: skip
    """Write index.html, a page per method, a page per run, and what they need; returns how many pages."""
    records = [r for r in records if r.status == "ok"]
    runs = _files("runs", [(id(r), f"{r.id}-s{r.seed}") for r in records])
    methods = _files("methods", [(m, m) for m in sorted({r.method for r in records})])
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    pages.globals |= {"pareto": pareto, "baseline": baseline, "methods": methods,
                      "run_of": lambda record: runs[id(record)]}  # fmt: skip
    pages.filters |= {"number": _number, "count": _count, "chance": formats.chance}
    here = set(registry.methods())
    cards = {name: _card(name) if name in here or ":" in name else None for name in methods}
    boards = [_board(place, facts, table, cards) for place, (facts, table) in enumerate(tables)]
    _save(folder / "index.html", pages, "index.html", root="", boards=boards, papers=papers,
          notes=list(notes), about=formats.ABOUT, axes=AXES, total=len(records))  # fmt: skip
    for name, file in methods.items():
        mine = [r for r in records if r.method == name]
        _save(folder / file, pages, "method.html", root="../", name=name, card=cards[name], records=mine,
              curves=_curves(mine))  # fmt: skip
    for r in records:
        _save(folder / runs[id(r)], pages, "run.html", root="../", r=r, rows=_fields(r),
              curves=_curves([r]))  # fmt: skip
    _remove_others(folder, {*methods.values(), *runs.values()})
    for file in ("style.css", "script.js"):
        write_atomically(folder / file, (_FOLDER / file).read_bytes())
    return 1 + len(methods) + len(records)


def _remove_others(folder: Path, pages: set[str]) -> None:
    """Remove pages that an earlier call made of methods and runs that are gone; nobody else's files."""
    for kind in ("methods", "runs"):
        for file in (folder / kind).glob("*.html"):
            if f"{kind}/{file.name}" not in pages and MARK in file.read_text(errors="replace")[:2000]:
                file.unlink()


def _save(path: Path, pages: jinja2.Environment, template: str, **facts: Any) -> None:
    text = pages.get_template(template).render(facts).encode()
    write_atomically(path, text, durable=False)


def _files(folder: str, named: list[tuple[Any, str]]) -> dict[Any, str]:
    """A page's file for each key, from its name; names that come out alike get a number."""
    taken: dict[str, int] = {}
    found = {}
    for key, name in named:
        plain = store.slug(name).lower()
        taken[plain] = number = taken.get(plain, 0) + 1
        found[key] = f"{folder}/{plain}{f'.{number}' if number > 1 else ''}.html"
    return found


def _card(name: str) -> dict[str, Any] | None:
    """What the method says of itself; None where it is not installed here."""
    try:
        cls = registry.get(name)
        presets = published.presets(cls)
    except (UserError, ImportError):
        return None
    text = cls.card or inspect.getdoc(inspect.getmodule(cls)) or ""
    return {"title": cls.title, "paper": cls.paper, "family": cls.family, "text": text, "lr": cls.lr,
            "presets": presets}  # fmt: skip


def _board(place: int, facts: dict[str, Any], table: pd.DataFrame, cards: dict[str, Any]) -> dict[str, Any]:
    facts = {k: facts.get(k) for k in board.SHARED}
    rows = [{k: None if _missing(v) else v for k, v in row.items()} for row in table.to_dict("records")]
    for row in rows:
        row["family"] = (cards[row["method"]] or {}).get("family") or "not installed here"
    scored = [r for r in rows if r["score"] is not None]
    plots = {
        axis: pareto.plot([(r["method"], r[axis], r["score"]) for r in scored if r[axis] is not None])
        for axis in AXES
    }
    return {
        "id": f"board-{place}", "facts": facts, "title": formats.title(facts),
        "device": formats.device(facts), "conditions": formats.conditions(facts),
        "metric": facts["metric"] or "score", "rows": rows,
        "best": scored[0] if scored else None, "plots": {k: p for k, p in plots.items() if p},
        "runs": sum(len(r["records"]) for r in rows),
    }  # fmt: skip


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _curves(records: list[Record]) -> list[dict[str, Any]]:
    """Learning curves as lines in a box of 320 x 120."""
    found = []
    for r in [r for r in records if r.loss_curve and len(r.loss_curve) > 1][:CURVES]:
        low, high = min(r.loss_curve), max(r.loss_curve)
        wide, tall = 312 / (len(r.loss_curve) - 1), 104 / (high - low or 1)
        line = " ".join(
            f"{4 + i * wide:.1f},{112 - (v - low) * tall:.1f}" for i, v in enumerate(r.loss_curve)
        )
        found.append({"record": r, "line": line, "first": r.loss_curve[0], "last": r.loss_curve[-1]})
    return found


def _fields(r: Record) -> list[tuple[str, str, str]]:
    """The record as (part, field, value)."""
    found = []
    for key, value in r.model_dump(mode="json", exclude={"command", "loss_curve"}).items():
        if value in (None, {}, []):
            continue
        pairs = value.items() if isinstance(value, dict) else [("", value)]
        for name, inner in pairs:
            text = inner if isinstance(inner, str) else _JSON.encode(inner)
            found.append((key, name, text))
    return found


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{int(value):,}"
