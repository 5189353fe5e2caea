"""Simulated boards: how often the ranks separate equal methods, and how large a difference they find.

    python tools/simulate_ranks.py --boards 1000 --out results/ranks.md

Every simulated run is a record with its outcomes per row (`--through-files`: written, and read by the command
`board`; otherwise handed to the same functions in memory; a test holds that both give the same ranks). Beside
the rule of the boards stands the one of version 0.1: sign flips of rows, seeds taken as given.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy import signal, stats

from peftzoo.adapters import write_atomically
from peftzoo.boards import ranks
from peftzoo.records import store
from peftzoo.records.metric_terms import METRICS, Sample
from peftzoo.records.schema import Record

Array = np.ndarray
ROWS, METHODS, FLIPS = 872, 10, 0.125
OLD_BOARDS = 100
"""The rule of 0.1 is counted on as many boards."""


def propensities(rng: np.random.Generator, n: int, accuracy: float, flips: float) -> Array:
    """(n,): how likely each row is answered rightly, so that two seeds disagree on a share `flips` of rows.

    A beta distribution: E[2 p (1 - p)] = 2 a (1 - a) s / (s + 1). The share is at most 0.9 of 2 a (1 - a).
    """
    most = 2 * accuracy * (1 - accuracy)
    share = min(flips, 0.9 * most)
    s = share / (most - share)
    return rng.beta(accuracy * s, (1 - accuracy) * s, n)


def right_answers(rng: np.random.Generator, p: Array, shift: float) -> Array:
    """(n,) of 0 and 1: answers of one run whose expected accuracy is shifted by `shift`."""
    right = (rng.random(len(p)) < p).astype(float)
    share = shift / max(1 - p.mean(), 1e-6) if shift > 0 else -shift / max(p.mean(), 1e-6)
    moved = rng.random(len(p)) < min(share, 1.0)
    right[moved & (right == (0 if shift > 0 else 1))] = 1.0 if shift > 0 else 0.0
    return right


class World:
    """What the methods of a board have in common: rows, their labels, and how hard they are."""

    def __init__(self, rng: np.random.Generator, metric: str, n: int, accuracy: float, flips: float) -> None:
        self.rng, self.metric = rng, metric
        self.p = propensities(rng, n, accuracy, flips)
        self.labels = (rng.random(n) < 0.5).astype(float)
        self.x, self.common = rng.normal(size=n), rng.normal(size=n)
        self.flips = flips

    def run(self, shift: float, broken: bool) -> tuple[Array, Array]:
        """(answers, references) (n,) of one run; a broken one gives one answer to every row."""
        n = len(self.p)
        if self.metric == "pearson":
            if broken:
                return self.rng.normal(size=n), self.x
            own = self.rng.normal(size=n) * (2 * self.flips) ** 0.5
            return self.x * (1 + 4 * shift) + 0.6 * self.common + own, self.x
        if broken:
            return np.ones(n), self.labels
        right = right_answers(self.rng, self.p, shift)
        return np.where(right == 1, self.labels, 1 - self.labels), self.labels


Run = tuple[Array, Array]
"""Answers and references (n,)."""


def board(
    rng: np.random.Generator,
    metric: str = "acc",
    seeds: int = 5,
    deviation: float = 0.011,
    n: int = ROWS,
    accuracy: float = 0.8,
    flips: float = FLIPS,
    broken: float = 0.0,
    better: float = 0.0,
    deviations: Callable[[int], float] | None = None,
) -> list[list[Run]]:
    """Methods x seeds of (answers, references); the first method is better by `better`."""
    world = World(rng, metric, n, accuracy, flips)
    methods = []
    for m in range(METHODS):
        spread = deviations(m) if deviations else deviation
        shifts = rng.normal(0, spread, seeds) + (better if m == 0 else 0.0)
        methods.append([world.run(shift, rng.random() < broken) for shift in shifts])
    return methods


def samples(methods: list[list[Run]], metric: str) -> list[dict[int, Sample]]:
    """The outcomes as `records.outcomes` reads them."""
    terms, value = METRICS[metric]
    rows = tuple(range(len(methods[0][0][0])))
    return [{s: Sample(rows, terms(*run), value) for s, run in enumerate(runs)} for runs in methods]


def new_rule(methods: list[dict[int, Sample]]) -> ranks.Comparison:
    """What the boards say."""
    return ranks.compare([ranks.Entry(s) for s in methods], splits=0)


def old_rule_separates(methods: list[dict[int, Sample]]) -> bool:
    """Whether the rule of 0.1 separates any two: sign flips of the rows against the best, with Holm."""
    means = [np.mean([s.value() for s in by_seed.values()]) for by_seed in methods]
    best = int(np.argmax(means))
    p = []
    for m, by_seed in enumerate(methods):
        if m != best:
            difference = sum(methods[best][s].terms[:, 0] - by_seed[s].terms[:, 0] for s in by_seed)
            sizes, counts = np.unique(np.abs(difference[difference != 0]).astype(int), return_counts=True)
            p.append(_sign_flip_p_value(sizes, counts, int(abs(difference.sum()))))
    return min(v for v in ranks.holm(p) if v is not None) < ranks.SIGNIFICANCE


def _sign_flip_p_value(sizes: Array, counts: Array, total: int) -> float:
    pmf = np.ones(1)
    for size, n in zip(sizes, counts, strict=True):
        one = np.zeros(size * n + 1)
        one[::size] = stats.binom.pmf(np.arange(n + 1), n, 0.5)
        pmf = signal.convolve(pmf, one)
    return float(min(1.0, 2 * pmf[: (len(pmf) - 1 - total) // 2 + 1].sum())) if total else 1.0


def records(methods: list[list[Run]], metric: str) -> Iterator[tuple[Record, list[dict]]]:
    """Records of the runs with their outcomes."""
    train = {"steps": 100, "batch_size": 16, "lr": 1e-3, "precision": "fp32", "max_length": 128}
    for m, runs in enumerate(methods):
        for s, (answers, references) in enumerate(runs):
            terms, value = METRICS[metric]
            score = float(value(terms(answers, references).mean(0, keepdims=True))[0])
            name = f"method-{m:02d}"
            record = Record(
                measure_version=1, id=f"{m:012x}", name=f"{name}/simulated/none/s{s}", status="ok",
                created="2026-01-01T00:00:00+00:00", method=name, task="simulated", model="none", seed=s,
                suite="simulated", protocol="simulated", view="head", task_version=1.0, method_config={},
                train_config=train, model_source={}, environment={"device": "none"}, command="simulated",
                data={"source": "embedded", "id": "simulated", "scored_rows": len(answers)},
                score={"metric": metric, "value": score, "rows": len(answers)},
            )  # fmt: skip
            pairs = enumerate(zip(answers.tolist(), references.tolist(), strict=True))
            yield record, [{"row": i, "answer": a, "reference": r} for i, (a, r) in pairs]


def through_files(methods: list[list[Run]], metric: str) -> list[dict]:
    """The rows of the table that the command `board --json` makes of the runs."""
    from peftzoo import cli

    with tempfile.TemporaryDirectory() as folder:
        for record, outcomes in records(methods, metric):
            store.write(Path(folder), record, outcomes)
        out, argv = io.StringIO(), sys.argv
        sys.argv = ["peftzoo", "board", folder, "--json", "--baseline", "method-00", "--quiet"]
        try:
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                cli.main()
        finally:
            sys.argv = argv
    (table,) = json.loads(out.getvalue())
    return sorted(table["table"], key=lambda row: row["method"])


def separates(intervals: list[tuple[int, int]]) -> bool:
    """Whether any rank interval excludes a rank."""
    return any((low, high) != (1, len(intervals)) for low, high in intervals)


LEVEL = [
    ("accuracy 0.6", {"accuracy": 0.6}), ("accuracy 0.8", {}), ("accuracy 0.95", {"accuracy": 0.95}),
    ("F1", {"metric": "f1"}), ("correlation", {"metric": "pearson"}),
]  # fmt: skip
OTHERS = [
    ("5 % of answers flip", {"flips": 0.05}),
    ("25 % of answers flip", {"flips": 0.25}),
    ("a tenth of the runs breaks down", {"broken": 0.1}),
    ("F1, a tenth of the runs breaks down", {"metric": "f1", "broken": 0.1}),
    ("five of 0.5 points, five of 2", {"deviations": lambda m: 0.005 if m < 5 else 0.02}),
    ("nine of 0.7 points, one of 4", {"deviations": lambda m: 0.007 if m < 9 else 0.04}),
]


def share(boards: int, seeds: int, deviation: float, first: int = 0, **world: object) -> tuple[float, float]:
    """Shares of boards of equal methods on which (the boards' rule, the rule of 0.1) separates any two."""
    metric, new, old = str(world.get("metric", "acc")), 0, 0
    for b in range(boards):
        rng = np.random.default_rng([first, b, seeds, round(deviation * 1e4)])
        methods = samples(board(rng, seeds=seeds, deviation=deviation, **world), metric)
        new += separates(new_rule(methods).ranks)
        old += metric == "acc" and b < OLD_BOARDS and old_rule_separates(methods)
    return new / boards, old / min(boards, OLD_BOARDS) if metric == "acc" else float("nan")


def power(boards: int, seeds: int, better: float, deviation: float = 0.011) -> float:
    """Share of boards on which a method that is better by so much is alone in the set of the best."""
    found = 0
    for b in range(boards):
        rng = np.random.default_rng([7, b, seeds])
        best = new_rule(samples(board(rng, seeds=seeds, deviation=deviation, better=better), "acc")).best
        found += best == [True] + [False] * (METHODS - 1)
    return found / boards


def page(boards: int, say: Callable[[str], None]) -> str:
    """The results page."""
    error = 1.96 * (0.05 * 0.95 / boards) ** 0.5
    lines = [f"""# Ranks: level and power

Made by `python tools/simulate_ranks.py --boards {boards}`. {METHODS} methods that are in truth alike, {ROWS}
rows: boards on which any two are separated (an interval of ranks that is not 1 to {METHODS}), in %. Right: at
most 5 (the simulation's own error: {100 * error:.1f}). In brackets the rule of version 0.1, which took the
seeds as given ({OLD_BOARDS} boards). Seed deviation: of a run's true score, in points; the answers that flip
from seed to seed ({FLIPS:.1%} of the rows, as in the committed records of SST-2) come on top. Where an
accuracy leaves less room, nine tenths of it flip.

| metric | seeds | 0.5 points | 1 point | 2 points |
|---|---|---|---|---|"""]  # fmt: skip
    for title, world in LEVEL:
        for seeds in (3, 5, 10):
            cells = []
            for deviation in (0.005, 0.01, 0.02):
                new, old = share(boards, seeds, deviation, **world)
                cells.append(f"{100 * new:.1f}" + ("" if old != old else f" ({100 * old:.0f})"))
            lines.append(f"| {title} | {seeds} | {' | '.join(cells)} |")
            say(lines[-1])
    lines.append("\n| accuracy 0.8, 1 point | 3 seeds | 5 seeds | 10 seeds |\n|---|---|---|---|")
    for title, world in OTHERS:
        cells = [f"{100 * share(boards, seeds, 0.01, **world)[0]:.1f}" for seeds in (3, 5, 10)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
        say(lines[-1])
    lines.append(f"""
Power: one method is better by so many points, the seed deviation is 1.1; boards on which it alone may be the
best, in % ({boards} boards each).

| seeds | 2 points | 4 | 6 | 8 |
|---|---|---|---|---|""")
    for seeds in (3, 5, 10):
        cells = [f"{100 * power(boards, seeds, better):.0f}" for better in (0.02, 0.04, 0.06, 0.08)]
        lines.append(f"| {seeds} | {' | '.join(cells)} |")
        say(lines[-1])
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boards", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="Write the page here.")
    parser.add_argument(
        "--through-files", type=int, metavar="N", help="Check N boards through files instead."
    )
    options = parser.parse_args()
    began = time.perf_counter()
    if options.through_files:
        count = 0
        for b in range(options.through_files):
            made = board(np.random.default_rng([0, b, 5, 110]))
            table = through_files(made, "acc")
            count += separates([(row["rank"], row["rank_high"]) for row in table])
        print(f"{count} of {options.through_files} boards separate equal methods")
    else:
        text = page(
            options.boards, lambda line: print(f"{time.perf_counter() - began:6.0f} s {line}", flush=True)
        )
        if options.out:
            write_atomically(options.out, text.encode())
