"""A search of the learning rate on a grid: successive halving, then a comparison over several seeds.

Rates lie a factor sqrt(10) apart around the method's default. Every rate trains for a fraction of the
steps, the better half of them for a larger fraction, and the better half of these for all steps, with three
seeds. The best rate has to lie between two that trained as long: a missing neighbour is tried too, beyond the
grid as well, up to `MAX_ADDED` rates. What counts is the mean loss on held-out training rows; rates at which
a seed ends above the loss that it began with come last.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peftzoo.records import trials
from peftzoo.records.schema import Record
from peftzoo.runs.plan import LookupCache, Plan, Request
from peftzoo.runs.run import new_record
from peftzoo.sweeps import searches
from peftzoo.sweeps.searches import LAST_ROUND_SEEDS, Tried
from peftzoo.sweeps.sweep_file import Search

FACTOR = 10**0.5
"""Between neighbouring rates."""
ROUNDS = ((0.25, 1), (0.5, 1), (1.0, LAST_ROUND_SEEDS))
"""(share of the steps, seeds) of each round."""
MAX_ADDED = 6
"""Rates that the last round may add to the better ones of the round before."""

LEAST_STEPS = 2
"""Of a trial, whose first step may be all warm-up."""

TrialKey = tuple[int, int, int]
"""(number of the rate, steps, seed); rate 0 is the method's default."""


class LrGrid:
    """The search for one method, task and model; a `searches.SearchRun`.

    What it asks for next depends on the losses told so far alone. Every finished trial is on record
    (`records.trials`), and an interrupted search goes on from there.
    """

    measure = "loss"

    def __init__(
        self, search: Search, request: Request, seeds: list[int], cache: LookupCache | None = None
    ) -> None:
        self.search, self.request, self.seeds = search, request, seeds
        self.cache = cache or LookupCache()
        plan = Plan(request, self.cache)
        searches.check_seeds(seeds, range(search.seed, search.seed + LAST_ROUND_SEEDS))
        self.lr, n = plan.train_config.lr, search.lr_grid or 0
        self.grid = [*range(-(n // 2), n - n // 2)] if has_rate(plan) else []
        self.steps = search.steps or plan.train_config.steps
        least = min(LEAST_STEPS, self.steps)
        self.rounds = [(max(least, round(share * self.steps)), count) for share, count in ROUNDS]
        self.hold_out = (searches.rows_to_hold_out(plan, search.rows), search.seed) if self.grid else (0, 0)
        self.results: dict[TrialKey, Record | None] = {}
        self.under_way: dict[TrialKey, Request] = {}
        self.spent = {"trials": 0, "steps": 0, "seconds": 0.0}
        self.last_failure = "none was made"

    @property
    def title(self) -> str:
        """Method and task in words, for messages."""
        return f"{self.request.method} on {self.request.task}"

    def rate(self, point: int) -> float:
        """The learning rate with this number, to four digits."""
        return float(f"{self.lr * FACTOR**point:.4g}") if point else self.lr

    def check_space(self) -> None:
        """Nothing can be wrong with a rate; for `study.Study`, whose space is given."""

    # -- rounds -------------------------------------------------------------------------------------

    def _next_keys(self) -> tuple[int, list[TrialKey]]:
        """(number of the round, its trials without a result); no trials after the last round."""
        points = self.grid
        for level in range(len(self.rounds) - 1):
            if missing := self._missing(level, points):
                return level, missing
            points = sorted(points, key=lambda p, level=level: self._tried(level, p).rank)
            points = points[: -(-len(points) // 2)]
        last = len(self.rounds) - 1
        return last, self._missing(last, self._finalists(points))

    def _finalists(self, points: list[int]) -> list[int]:
        """The rates of the last round so far: these, and neighbours of the best where they are missing."""
        last, added = len(self.rounds) - 1, 0
        points = [*points]
        while points and not self._missing(last, points):
            best = min(points, key=lambda p: self._tried(last, p).rank)
            neighbours = [p for p in (best - 1, best + 1) if p not in points][: MAX_ADDED - added]
            if not neighbours:
                break
            points += neighbours
            added += len(neighbours)
        return points

    def _keys(self, level: int, point: int) -> list[TrialKey]:
        steps, count = self.rounds[level]
        return [(point, steps, self.search.seed + i) for i in range(count)]

    def _missing(self, level: int, points: list[int]) -> list[TrialKey]:
        return [key for p in points for key in self._keys(level, p) if key not in self.results]

    def _tried(self, level: int, point: int) -> Tried:
        """What came of a rate in a round, of which all trials have results."""
        tried = Tried({"lr": self.rate(point)}, self.rounds[level][0])
        for key in self._keys(level, point):
            tried.add(self.results[key])
        return tried

    def _all_tried(self) -> list[tuple[int, Tried]]:
        """(round, what came of a rate in it), for every rate and round with all results."""
        points = sorted({point for point, _, _ in self.results})
        return [
            (level, self._tried(level, p))
            for level in range(len(self.rounds))
            for p in points
            if not self._missing(level, [p])
        ]

    # -- ask and tell -------------------------------------------------------------------------------

    def begin(self, out: Path) -> None:
        """Take over the trials that are on record in `out`."""
        while (request := self.ask()) is not None:
            if found := trials.find(out, new_record(Plan(request, self.cache))):
                self.tell(found, request)
        self.under_way.clear()

    def ask(self) -> Request | None:
        """The request of a trial that can begin now; None if all that can are under way."""
        for key in self._next_keys()[1]:
            if key not in self.under_way:
                self.under_way[key] = self._trial_request(key)
                return self.under_way[key]
        return None

    def _trial_request(self, key: TrialKey) -> Request:
        point, steps, seed = key
        values = {"lr": self.rate(point)}
        request = searches.trial(
            self.request, values, steps=steps, seed=seed, hold_out=self.hold_out, loss_only=True
        )
        return replace(request, start_loss=self._start_loss(seed))

    def _start_loss(self, seed: int) -> float | None:
        """The loss before training, which does not depend on the rate; None before the seed's first trial."""
        told = (r.held_out or {} for (_, _, s), r in self.results.items() if s == seed and r)
        return next((facts["start_loss"] for facts in told if facts.get("start_loss") is not None), None)

    def tell(self, record: Record | None, request: Request | None = None) -> None:
        """Report the record of the trial of `request`; None, and a failed one, have no loss."""
        key = next(k for k, r in self.under_way.items() if r == request)
        del self.under_way[key]
        self.results[key] = record
        if searches.held_out_loss(record) is None:
            self.last_failure = (record and record.reason) or "it is not on record"
        self.spent["trials"] += 1
        self.spent["steps"] += key[1]
        self.spent["seconds"] = round(self.spent["seconds"] + ((record and record.train_seconds) or 0.0), 3)

    @property
    def done(self) -> bool:
        """Whether no trial is under way and none is left."""
        return not self.under_way and not self._next_keys()[1]

    # -- before and after ---------------------------------------------------------------------------

    def _sizes(self) -> list[int]:
        """Rates of each round, as many as a search usually tries: in the last one two neighbours too."""
        half = -(-len(self.grid) // 2)
        return [len(self.grid), half, -(-half // 2) + 2]

    def left(self) -> tuple[int, int]:
        """Trials that are expected to follow, and their steps."""
        level, missing = self._next_keys()
        if not missing:
            return 0, 0
        counts = [n * seeds for n, (_, seeds) in zip(self._sizes(), self.rounds, strict=True)]
        expected = [self._expected(level, missing), *counts[level + 1 :]]
        steps = [steps for steps, _ in self.rounds[level:]]
        return sum(expected), sum(n * s for n, s in zip(expected, steps, strict=True))

    def _expected(self, level: int, missing: list[TrialKey]) -> int:
        """Trials to follow in this round; of the last one the neighbours too that are not asked for yet."""
        steps, seeds = self.rounds[level]
        if level + 1 < len(self.rounds):
            return len(missing)
        done = sum(1 for _, s, _ in self.results if s == steps)
        return max(len(missing), self._sizes()[level] * seeds - done)

    def outline(self, out: Path) -> list[tuple[str, Request, int, bool]]:
        """What is done and to do, for a plan; the number of trials to do is the usual one."""
        self.begin(out)
        level, missing = self._next_keys()
        rows = []
        for number, (steps, count) in enumerate(self.rounds if self.grid else []):
            done = sum(1 for _, s, seed in self.results if s == steps and seed < self.search.seed + count)
            later = self._sizes()[number] * count if number > level else 0
            to_do = self._expected(level, missing) if number == level and missing else later
            request = self._trial_request((0, steps, self.search.seed))
            rows += [("trial", request, done, True)] if done else []
            rows += [("trial", request, to_do, False)] if to_do else []
        if missing:
            return [*rows, ("after the search", self.request, len(self.seeds), False)]
        return rows + [("run", request, 1, False) for request in self.final_requests()]

    def _last_round(self) -> dict[int, Tried]:
        """What came of each rate that was tried in the last round, by its number."""
        last, points = len(self.rounds) - 1, sorted({point for point, _, _ in self.results})
        return {p: self._tried(last, p) for p in points if not self._missing(last, [p])}

    def chosen(self) -> Tried | None:
        """What came of the chosen rate in the last round; None if no rate has a loss."""
        return searches.best(self._last_round().values())

    def _at_edge(self) -> bool:
        """Whether the chosen rate does not lie between two others of the last round."""
        tried, chosen = self._last_round(), self.chosen()
        point = next(p for p, t in tried.items() if t.values == chosen.values)
        return not {point - 1, point + 1} <= tried.keys()

    def final_requests(self) -> list[Request]:
        """The runs with the chosen rate, one per seed; [] if no trial of the last round has a loss."""
        if not self.grid:
            return [replace(self.request, seed=s) for s in self.seeds]
        if (best := self.chosen()) is None:
            return []
        tried = [t.facts() for _, t in self._all_tried()]
        facts = {"budget": self.budget(), "used": dict(self.spent), "default": {"lr": self.lr}}
        facts |= searches.choice(best) | {"tried": tried}
        facts |= {"at_edge": True} if self._at_edge() else {}
        request = searches.with_values(self.request, best.values)
        return [replace(request, seed=s, tuning=facts) for s in self.seeds]

    def budget(self) -> dict[str, Any]:
        """The budget of the search, for the record: the same for every method, but for its space."""
        half = -(-len(self.grid) // 2)
        most = len(self.grid) + half + (-(-half // 2) + MAX_ADDED) * LAST_ROUND_SEEDS
        return {
            "sampler": "lr-grid", "by": "loss", "points": len(self.grid), "factor": round(FACTOR, 4),
            "rounds": [{"steps": steps, "seeds": count} for steps, count in self.rounds],
            "added": MAX_ADDED, "trials": most, "steps": self.steps, "rows": self.hold_out[0],
            "seed": self.search.seed,
            "space": {"lr": [self.rate(self.grid[0]), self.rate(self.grid[-1])]},
        }  # fmt: skip


def has_rate(plan: Plan) -> bool:
    """Whether the method trains with a learning rate."""
    return plan.cls.trains and not plan.cls.searches
