"""A measure against the learning rate: lines of methods, and the pixel coordinates of their plots.

The template draws them. Methods differ in mark and dashes as well as in colour.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import pandas as pd

from peftzoo.boards import ranks
from peftzoo.boards._axes import linear_ticks, log_ticks
from peftzoo.boards.tuning import Effect, Rate, Row, last_round
from peftzoo.records.schema import number

MIN_RATES = 3
"""Scores at fewer learning rates make no line."""
COLOURS, DASHES = 6, 5
"""Classes c0, c1, ... and d0, d1, ... of the style sheet."""
LARGE, SMALL = (640, 380), (320, 190)
"""Width and height of the plot of all methods, and of the plot of one."""
TOP, RIGHT, BOTTOM, LEFT = 12, 26, 40, 52
HEADROOM = 3.0
"""Values of faint lines are left out that lie more than so many spans of the others above the lowest."""
CHARACTER = 8.1
"""Width of a digit of a label on a small screen, in pixels; less on a large one."""
_STAR = [
    (math.sin(math.pi * i / 5) * (1.25, 0.5)[i % 2], -math.cos(math.pi * i / 5) * (1.25, 0.5)[i % 2])
    for i in range(10)
]
_CROSS = [(-.35, -1), (.35, -1), (.35, -.35), (1, -.35), (1, .35), (.35, .35),
          (.35, 1), (-.35, 1), (-.35, .35), (-1, .35), (-1, -.35), (-.35, -.35)]  # fmt: skip
SHAPES = (
    [(math.cos(math.pi * i / 8), math.sin(math.pi * i / 8)) for i in range(16)],
    [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
    [(0, -1.25), (1, 0), (0, 1.25), (-1, 0)],
    [(0, 1.15), (1.1, -0.85), (-1.1, -0.85)],
    _STAR,
    _CROSS,
)
"""Corners of the marks; their number and `COLOURS` have no common divisor."""


@dataclass(frozen=True)
class Point:
    """A learning rate and what was measured there; `value` is None where it is not finite.

    `broken`: of `runs`, those that broke down; `filled`: the rate that was chosen.
    """

    lr: float
    value: float | None
    stderr: float | None
    runs: int
    broken: int
    filled: bool = False


@dataclass(frozen=True)
class Line:
    """The points of a method, from the lowest rate on; `style` chooses colour, mark and dashes."""

    name: str
    style: int
    points: list[Point]
    note: str = ""
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot: its lines, and what else is marked in it.

    `band`: a range of rates; `limit`: a value; `default`: a rate; values above `cap` stand at the top edge.
    """

    lines: list[Line]
    band: tuple[float, float] | None = None
    limit: float | None = None
    default: float | None = None
    cap: float | None = None
    row: Row | None = field(default=None, repr=False)


def panels_of_losses(effect: Effect) -> list[Panel]:
    """A panel per tuned method: held-out loss against learning rate, one line a round of the search."""
    panels = []
    for style, row in enumerate(effect.rows):
        compared = last_round(row.rates)
        if not row.rates or not compared:
            continue
        earlier: dict[float, list[Rate]] = {}
        for rate in row.rates:
            if compared.get(rate.lr) is not rate:
                earlier.setdefault(rate.steps, []).append(rate)
        lines = [
            Line(row.label, style, _points(rates, row), f"{steps:g} steps", faint=True)
            for steps, rates in sorted(earlier.items())
        ]
        steps = next(iter(compared.values())).steps
        lines.append(Line(row.label, style, _points([*compared.values()], row), f"{steps:g} steps"))
        band = None if None in (row.lr_low, row.lr_high) else (row.lr_low, row.lr_high)
        means = [r for r in compared.values() if r.mean is not None and not r.breakdowns]
        best = min(means, key=lambda r: r.mean, default=None)
        limit = best and best.mean + best.stderr
        panels.append(Panel(lines, band, limit, row.default_lr, row.start_loss, row))
    return panels


def _points(rates: Sequence[Rate], row: Row) -> list[Point]:
    return [
        Point(r.lr, r.mean, r.stderr, len(r.losses), r.breakdowns, r.lr == row.lr)
        for r in sorted(rates, key=lambda r: r.lr)
    ]


def panels_of_scores(table: pd.DataFrame) -> list[Panel]:
    """A panel per method whose runs in the table differ in the learning rate only, at three rates or more."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        record = row["records"][0]
        lr, score = number(record.train_config.get("lr")), row["score"]
        if (
            number(record.train_config.get("steps"))
            and lr
            and lr > 0
            and score == score
            and score is not None
        ):
            rest = {k: v for k, v in record.train_config.items() if k != "lr"}
            key = json.dumps([record.method, record.method_config, rest, bool(record.tuning)], sort_keys=True)
            groups.setdefault(key, []).append(row)
    lines = [rows for rows in groups.values() if len({r["lr"] for r in rows}) == len(rows) >= MIN_RATES]
    uses = Counter(rows[0]["method"] for rows in lines)
    panels = []
    for style, rows in enumerate(lines):
        name, options = rows[0]["method"], rows[0]["options"]
        label = f"{name} ({options})" if uses[name] > 1 else name
        points = [
            Point(r["lr"], float(r["score"]), _stderr(r), len(r["records"]), int(r["broken"]))
            for r in sorted(rows, key=lambda r: r["lr"])
        ]
        panels.append(Panel([Line(label, style, points)]))
    return panels


def _stderr(row: dict[str, Any]) -> float | None:
    """Standard error of the mean over seeds, from its t interval."""
    half = row["ci95"]
    if half is None or half != half:
        return None
    return half / ranks.t_quantile(row["seeds"] - 1)


def together(panels: Sequence[Panel]) -> Panel:
    """All methods in one panel, each by its last line."""
    caps = [p.cap for p in panels if p.cap is not None]
    lines = [replace(p.lines[-1], note="") for p in panels]
    return Panel(lines, cap=max(caps) if len(caps) == len(panels) else None)


# -- coordinates ----------------------------------------------------------------------------------------


def plot(panel: Panel, measure: str, size: tuple[int, int] = LARGE) -> dict[str, Any]:
    """Lines, marks, bars, ticks and what else the template draws, in pixels."""
    width, height = size
    points = [p for line in panel.lines for p in line.points]
    bottom, top = _y_range(panel)
    y_ticks = [(v, f"{v:.4g}") for v in linear_ticks(bottom, top)]
    left = max(LEFT, 10 + CHARACTER * max((len(text) for _, text in y_ticks), default=0))
    rates = [math.log10(p.lr) for p in points]
    pad = max((max(rates) - min(rates)) * 0.06, 0.06)
    low, high = min(rates) - pad, max(rates) + pad

    def x(lr: float) -> float:
        share = (math.log10(lr) - low) / (high - low)
        return round(left + share * (width - left - RIGHT), 1)

    def hidden(line: Line, p: Point) -> bool:
        value = _shown(p, panel.cap)
        return line.faint and value is not None and value > top

    def y(value: float | None) -> float:
        share = 0.0 if value is None else (top - value) / (top - bottom)
        return round(TOP + min(max(share, 0), 1) * (height - TOP - BOTTOM), 1)

    marks, bars = [], []
    for line in panel.lines:
        for p in line.points:
            if hidden(line, p):
                continue
            at = (x(p.lr), y(_shown(p, panel.cap)))
            marks.append({
                "x": at[0], "y": at[1], "d": _mark(line.style, *at, 3 if line.faint else 4.5),
                "style": line.style, "faint": line.faint, "filled": p.filled,
                "broken": bool(p.broken) and _times(*at), "title": _title(line, p, measure),
            })  # fmt: skip
            if p.stderr and _shown(p, panel.cap) is not None:
                ends = (y(p.value + p.stderr), y(p.value - p.stderr))
                bars.append({"x": at[0], "y1": ends[0], "y2": ends[1], "style": line.style})
    inside = bool(panel.default) and 10**low <= panel.default <= 10**high
    return {
        "width": width, "height": height, "left": round(left, 1), "right": width - RIGHT, "top": TOP,
        "bottom": height - BOTTOM, "marks": marks, "bars": bars,
        "lines": [{"d": "".join(_path([(x(p.lr), y(_shown(p, panel.cap))) for p in points])
                           for is_hidden, points in groupby(line.points, key=partial(hidden, line))
                           if not is_hidden),
                   "style": line.style, "faint": line.faint} for line in panel.lines],
        "band": panel.band and _band(x(panel.band[0]), x(panel.band[1])),
        "limit": None if panel.limit is None else y(panel.limit),
        "default": x(panel.default) if inside else None,
        "x_ticks": _thinned([(x(v), f"{v:g}") for v in log_ticks(low, high)]),
        "y_ticks": [(y(v), text) for v, text in y_ticks],
    }  # fmt: skip


def legend(panel: Panel) -> list[dict[str, Any]]:
    """Name and sample of each line, for a box of 34 x 14."""
    return [
        {"name": line.name, "style": line.style, "d": _mark(line.style, 17, 7, 4.5)} for line in panel.lines
    ]


def classes(style: int) -> str:
    """Those of the style sheet for a line's colour and dashes."""
    return f"c{style % COLOURS} d{style % DASHES}"


def _y_range(panel: Panel) -> tuple[float, float]:
    main = _values(panel, faint=False)
    bottom, top = (min(main), max(main)) if main else (0.0, 1.0)
    highest = bottom + HEADROOM * (top - bottom)
    faint = [v for v in _values(panel, faint=True) if v <= highest or not main]
    bottom, top = min([bottom, *faint]), max([top, *faint])
    margin = max((top - bottom) * 0.08, 1e-3 * max(abs(top), abs(bottom), 1e-3))
    at_edge = any(_shown(p, panel.cap) is None for line in panel.lines for p in line.points)
    return bottom - margin, top + (3 * margin if at_edge else margin)


def _values(panel: Panel, faint: bool) -> list[float]:
    """Where the lines' points and bars begin and end, without those at the top edge."""
    points = [p for line in panel.lines if line.faint == faint for p in line.points]
    shown = [(p.value, p.stderr or 0.0) for p in points if _shown(p, panel.cap) is not None]
    return [v - e for v, e in shown] + [v + e for v, e in shown]


def _shown(point: Point, cap: float | None) -> float | None:
    """The value, or None for one that stands at the top edge."""
    above = cap is not None and point.value is not None and point.value > cap
    return None if above else point.value


def _band(start: float, end: float) -> tuple[float, float]:
    """(x, width) of a range; a single rate has a narrow one."""
    return round(start - 4, 1), round(end - start + 8, 1)


def _thinned(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Without labels that would overlap the one before."""
    kept: list[tuple[float, str]] = []
    for at, text in ticks:
        if not kept or at - kept[-1][0] > CHARACTER * (len(text) + len(kept[-1][1])) / 2 + 4:
            kept.append((at, text))
    return kept


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points)


def _mark(style: int, x: float, y: float, size: float) -> str:
    corners = SHAPES[style % len(SHAPES)]
    return _path([(round(x + size * dx, 1), round(y + size * dy, 1)) for dx, dy in corners]) + "Z"


def _times(x: float, y: float) -> str:
    """A cross over the mark of a rate at which a run broke down."""
    a, b, c, d = (round(v, 1) for v in (x - 7, x + 7, y - 7, y + 7))
    return f"M{a} {c}L{b} {d}M{a} {d}L{b} {c}"


def _title(line: Line, point: Point, measure: str) -> str:
    """What a pointer over the mark shows."""
    value = "not finite" if point.value is None else f"{point.value:.4g}"
    text = f"{line.name}: {measure} {value} at {point.lr:g}, {point.runs} seed{'s' * (point.runs != 1)}"
    text += f", {line.note}" if line.note else ""
    return text + (f", {point.broken} of {point.runs} broke down" if point.broken else "")
