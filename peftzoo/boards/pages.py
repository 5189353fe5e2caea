"""Records -> a static site that needs no server and loads nothing from elsewhere; all text is autoescaped."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from peftzoo.adapters import write_atomically
from peftzoo.boards import formats, pareto, rate_plots
from peftzoo.boards import tables as board
from peftzoo.contract import registry
from peftzoo.errors import UserError
from peftzoo.records import published, store
from peftzoo.records.schema import Record

AXES = {"trained": "trainable parameters", "memory_mib": "training memory, MiB (computed)",
        "step_ms": "step time, ms", "latency_ms": "latency, ms per token or pass"}  # fmt: skip
"""Cost columns of a table that its plot can show, with their axis labels."""
GENERATOR_TAG = '<meta name="generator" content="peftzoo board">'
"""Every page holds it, so that a later call removes only pages of this module."""
MAX_CURVES = 24
"""Learning curves on one page."""
_JSON = json.JSONEncoder(ensure_ascii=False)
_TEMPLATES = Path(__file__).parent.parent / "assets" / "site"
Tables = list[tuple[dict[str, Any], pd.DataFrame]]


def write(folder: Path, records: list[Record], tables: Tables, papers: list[dict[str, Any]],
          baseline: str = board.BASELINE, notes: Iterable[str] = ()) -> int:  # fmt: skip
    """Write index.html, a page per method, a page per run, style and script; returns the number of pages.

    `papers` are the rows of `replications.rows`, `notes` the messages on files that were left out.
    """
    records = [r for r in records if r.status == "ok"]
    run_pages = _page_paths("runs", [(id(r), f"{r.id}-s{r.seed}") for r in records])
    method_pages = _page_paths("methods", [(m, m) for m in sorted({r.method for r in records})])
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    templates.globals |= {"pareto": pareto, "formats": formats, "rate_plots": rate_plots,
                          "baseline": baseline, "methods": method_pages,
                          "run_of": lambda record: run_pages[id(record)]}  # fmt: skip
    templates.filters |= {"number": _fixed, "count": _with_commas, "chance": formats.p_value}
    installed = set(registry.methods())
    cards = {name: _method_card(name) if name in installed or ":" in name else None for name in method_pages}
    boards = [_board_fields(i, shared, table, cards) for i, (shared, table) in enumerate(tables)]
    _render(folder / "index.html", templates, "index.html", root="", boards=boards, papers=papers,
          notes=list(notes), about=_about(tables), axes=AXES, total=len(records))  # fmt: skip
    for name, file in method_pages.items():
        own = [r for r in records if r.method == name]
        _render(folder / file, templates, "method.html", root="../", name=name, card=cards[name], records=own,
                curves=_curves(own))  # fmt: skip
    for r in records:
        _render(folder / run_pages[id(r)], templates, "run.html", root="../", r=r, rows=_record_rows(r),
                curves=_curves([r]))  # fmt: skip
    _remove_stale_pages(folder, {*method_pages.values(), *run_pages.values()})
    for file in ("style.css", "script.js"):
        write_atomically(folder / file, (_TEMPLATES / file).read_bytes())
    return 1 + len(method_pages) + len(records)


def _about(tables: Tables) -> list[str]:
    tuned = any("tuning" in table.attrs for _, table in tables)
    return [formats.ABOUT, *([formats.ABOUT_TUNED] if tuned else [])]


def _remove_stale_pages(folder: Path, current: set[str]) -> None:
    """Remove pages that an earlier call wrote of methods and runs that are gone; never a file of the user."""
    for kind in ("methods", "runs"):
        for file in (folder / kind).glob("*.html"):
            if (
                f"{kind}/{file.name}" not in current
                and GENERATOR_TAG in file.read_text(errors="replace")[:2000]
            ):
                file.unlink()


def _render(path: Path, templates: jinja2.Environment, template: str, **variables: Any) -> None:
    text = templates.get_template(template).render(variables).encode()
    write_atomically(path, text, durable=False)


def _page_paths(folder: str, names: list[tuple[Any, str]]) -> dict[Any, str]:
    """Key -> path of its page, made from the name; names with the same slug are numbered."""
    uses: dict[str, int] = {}
    paths = {}
    for key, name in names:
        slug = store.slug(name).lower()
        uses[slug] = number = uses.get(slug, 0) + 1
        paths[key] = f"{folder}/{slug}{f'.{number}' if number > 1 else ''}.html"
    return paths


def _method_card(name: str) -> dict[str, Any] | None:
    """Title, paper, family, description and presets of a method; None where it is not installed."""
    try:
        cls = registry.get(name)
        presets = published.presets(cls)
    except (UserError, ImportError):
        return None
    text = cls.card or inspect.getdoc(inspect.getmodule(cls)) or ""
    return {"title": cls.title, "paper": cls.paper, "family": cls.family, "text": text, "lr": cls.lr,
            "presets": presets}  # fmt: skip


def _board_fields(
    index: int, table_fields: dict[str, Any], table: pd.DataFrame, cards: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the template of the index needs to draw one table and its plots."""
    shared = {k: table_fields.get(k) for k in board.SHARED}
    rows = [{k: None if _is_missing(v) else v for k, v in row.items()} for row in table.to_dict("records")]
    for row in rows:
        row["family"] = (cards[row["method"]] or {}).get("family") or "not installed here"
    for i, (interval, broken) in enumerate(
        zip(formats.rank_intervals(table), formats.broken(table), strict=True)
    ):
        rows[i] |= {"interval": interval, "broken_of": broken}
    scored, verdict = [r for r in rows if r["score"] is not None], table.attrs["verdict"]
    plots = {
        axis: pareto.plot([(r["method"], r[axis], r["score"]) for r in scored if r[axis] is not None])
        for axis in AXES
    }
    return {
        "id": f"board-{index}", "facts": shared, "title": formats.title(shared),
        "device": formats.device(shared), "conditions": formats.conditions(shared),
        "metric": shared["metric"] or "score", "rows": rows,
        "best": scored[0] if scored and verdict.crowned else None, "verdict": verdict,
        "plots": {k: p for k, p in plots.items() if p}, "tuning": table.attrs.get("tuning"),
        "rates": _rate_figures(table, shared["metric"] or "score"),
        "runs": sum(len(r["records"]) for r in rows),
    }  # fmt: skip


def _rate_figures(table: pd.DataFrame, metric: str) -> list[dict[str, Any]]:
    """Plots against the learning rate: of the held-out loss of tuned methods, of scores at several rates."""
    effect = table.attrs.get("tuning")
    losses = rate_plots.panels_of_losses(effect) if effect else []
    figures = []
    for measure, panels in (("held-out loss", losses), (metric, rate_plots.panels_of_scores(table))):
        if not panels:
            continue
        every = rate_plots.together(panels)
        small = [
            {"name": p.lines[-1].name, "plot": rate_plots.plot(p, measure, rate_plots.SMALL), "row": p.row}
            for p in panels
        ]
        figures.append({
            "measure": measure, "caption": "Held-out loss" if panels is losses else measure,
            "all": rate_plots.plot(every, measure), "legend": rate_plots.legend(every),
            "small": small, "losses": panels is losses,
        })  # fmt: skip
    return figures


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _curves(records: list[Record]) -> list[dict[str, Any]]:
    """Learning curves as SVG polylines in a box of 320 x 120."""
    curves = []
    for r in [r for r in records if r.loss_curve and len(r.loss_curve) > 1][:MAX_CURVES]:
        low, high = min(r.loss_curve), max(r.loss_curve)
        x_scale, y_scale = 312 / (len(r.loss_curve) - 1), 104 / (high - low or 1)
        line = " ".join(
            f"{4 + i * x_scale:.1f},{112 - (v - low) * y_scale:.1f}" for i, v in enumerate(r.loss_curve)
        )
        curves.append({"record": r, "line": line, "first": r.loss_curve[0], "last": r.loss_curve[-1]})
    return curves


def _record_rows(r: Record) -> list[tuple[str, str, str]]:
    """The record as rows (field, key inside the field or "", value as text)."""
    rows = []
    for key, value in r.model_dump(mode="json", exclude={"command", "loss_curve"}).items():
        if value in (None, {}, []):
            continue
        pairs = value.items() if isinstance(value, dict) else [("", value)]
        for name, inner in pairs:
            text = inner if isinstance(inner, str) else _JSON.encode(inner)
            rows.append((key, name, text))
    return rows


def _fixed(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _with_commas(value: float | None) -> str:
    return "" if value is None else f"{int(value):,}"
