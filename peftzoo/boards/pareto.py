"""The Pareto front of score against cost, and the pixel coordinates of its plot; the template draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peftzoo.boards._axes import linear_ticks, log_ticks

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 44
"""Size and margins of the plot, in pixels."""

Point = tuple[str, float, float]
"""Name, cost, score."""


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates (costs at most as much, scores at least as much, and is
    better in one of the two); cheapest first."""
    indices: list[int] = []
    best = -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][2])):
        _, cost, score = points[i]
        if score > best or (indices and points[indices[-1]][1:] == (cost, score)):
            indices.append(i)
            best = max(best, score)
    return indices


def plot(points: Sequence[Point]) -> dict[str, Any] | None:
    """Marks, ticks, labels and the front's SVG path, in pixels; None for no points.

    The cost axis is logarithmic, with a cost of 0 at its left end.
    """
    if not points:
        return None
    costs = [c for _, c, _ in points if c > 0]
    low, high = (math.log10(min(costs)), math.log10(max(costs))) if costs else (0.0, 1.0)
    pad = max((high - low) * 0.08, 0.06)
    low, high = low - pad - (0.12 * (high - low + 0.3) if len(costs) < len(points) else 0), high + pad
    bottom, top = min(s for *_, s in points), max(s for *_, s in points)
    margin = max((top - bottom) * 0.08, 1e-3 * max(abs(top), 1e-3))
    bottom, top = bottom - margin, top + margin

    def x(cost: float) -> float:
        share = 0.0 if cost <= 0 else (math.log10(cost) - low) / (high - low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(score: float) -> float:
        return round(TOP + (top - score) / (top - bottom) * (HEIGHT - TOP - BOTTOM), 1)

    best = front(points)
    marks = [
        {"name": name, "x": x(cost), "y": y(score), "cost": cost, "score": score, "best": i in set(best)}
        for i, (name, cost, score) in enumerate(points)
    ]
    steps = [(x(points[i][1]), y(points[i][2])) for i in best]
    line = f"M{steps[0][0]} {steps[0][1]}" + "".join(f"H{a}V{b}" for a, b in steps[1:]) + f"H{WIDTH - RIGHT}"
    zero = [(x(0), "0")] if len(costs) < len(points) else []
    return {
        "marks": marks, "line": line, "labels": _labels([marks[i] for i in best]),
        "x_ticks": zero + [(x(v), short(v)) for v in log_ticks(low, high)],
        "y_ticks": [(y(v), f"{v:.4g}") for v in linear_ticks(bottom, top)],
    }  # fmt: skip


def _labels(marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Names of the front's points, best first, without those for which there is no free place."""
    placed: list[tuple[float, float, float, float]] = []
    labels = []
    for m in sorted(marks, key=lambda m: -m["score"]):
        text_width = 6.6 * min(len(m["name"]), 24) + 4
        for right, rise in ((True, -7), (False, -7), (True, 15), (False, 15)):
            start, end = (
                (m["x"] + 6, m["x"] + 6 + text_width) if right else (m["x"] - 6 - text_width, m["x"] - 6)
            )
            box = (start, end, m["y"] + rise - 11, m["y"] + rise + 2)
            inside = start >= LEFT and end <= WIDTH - RIGHT + 8 and box[2] >= 0 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(
                box[0] < q[1] and q[0] < box[1] and box[2] < q[3] and q[2] < box[3] for q in placed
            ):
                placed.append(box)
                anchor = {"x": m["x"] + (6 if right else -6), "y": m["y"] + rise, "end": not right}
                labels.append({"name": m["name"][:24], **anchor})
                break
    return labels


def short(value: float) -> str:
    """A number with K, M or G: 23040 -> 23.04K."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
