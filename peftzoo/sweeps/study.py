"""Hyperparameter search with Optuna: the same budget for every method, measured on held-out training rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peftzoo.errors import not_installed
from peftzoo.records.schema import Record
from peftzoo.runs.plan import LookupCache, Plan, Request, resolve
from peftzoo.runs.run import is_on_record, new_record, read_record
from peftzoo.sweeps import searches
from peftzoo.sweeps.searches import LAST_ROUND_SEEDS, Tried
from peftzoo.sweeps.sweep_file import Range, Search

FINALISTS = 2
"""By loss, the best so many values are compared over several seeds."""
LR_FACTOR = 10.0
"""Without a search space, the learning rate is searched from 1/10 of the method's default to 10 times it."""


class Study:
    """The search for one method, task and model, as a loop of `ask` and `tell` (the names are Optuna's).

    Trials run one at a time, so that the search is deterministic: it depends on its seed and the trials'
    results alone. Every trial is on record; an interrupted search starts again and finds the finished trials.
    By loss, the best values of the trials are then compared over several seeds, at once.

    `search` is the budget, `request` the run whose options are searched, `seeds` those of the final runs.
    """

    def __init__(self, search: Search, request: Request, seeds: list[int]) -> None:
        optuna = _import_optuna()
        self.search, self.request, self.seeds = search, request, seeds
        plan = Plan(request)
        steps = search.steps or plan.train_config.steps
        self.space = self._method_space(plan)
        self.default_lr = plan.train_config.lr
        self.steps = steps if plan.cls.trains else plan.train_config.steps
        self.measure, self.by_loss, rows = search.by, search.by == "loss", search.rows
        self.higher_is_better = plan.higher_is_better and not self.by_loss
        if self.by_loss:
            searches.check_seeds(seeds, range(search.seed, search.seed + LAST_ROUND_SEEDS))
            rows = searches.rows_to_hold_out(plan, rows) if self.space else rows
        self.hold_out = (rows, search.seed)
        samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        self.study = optuna.create_study(
            direction="maximize", sampler=samplers[search.sampler](seed=search.seed)
        )
        self.trials: list[dict[str, Any]] = []
        """Values and score of each finished trial; the score is None if it failed."""
        self.tried: list[Tried] = []
        """By loss, what came of each trial, and of its values with other seeds."""
        self.under_way: list[Request] = []
        self.last_round: list[Request] | None = None
        """By loss, the trials of the best values with other seeds that are not under way yet."""
        self.spent = {"trials": 0, "steps": 0, "seconds": 0.0}
        self.last_failure, self.metric, self.optuna_trial = "none was made", None, None

    @property
    def title(self) -> str:
        """Method and task in words, for messages."""
        return f"{self.request.method} on {self.request.task}"

    def _method_space(self, plan: Plan) -> dict[str, Any]:
        """The search space of this method; values for the method alone override those for all methods."""
        method, space = self.request.method, self.search.space
        if not space and plan.cls.trains:
            lr = plan.train_config.lr
            return {"lr": Range(low=lr / LR_FACTOR, high=lr * LR_FACTOR, log=True)}
        own_space: dict[str, Any] = {}
        for key, values in sorted(space.items(), key=lambda item: item[0].count(".")):
            owner, _, option = key.removeprefix("set.").rpartition(".")
            if key.startswith("set.") and owner in ("", method):
                own_space[f"set.{option}"] = values
            elif not key.startswith("set.") and plan.cls.trains:
                own_space[key] = values
        return own_space

    def check_space(self) -> None:
        """Resolve a request with the ends of each range and each listed value, before the first trial.

        Raises the `UserError` of a value that the method does not accept.
        """
        ends = {k: [v.low, v.high] if isinstance(v, Range) else v for k, v in self.space.items()}
        resolve([self._trial_request({k: v[i % len(v)] for k, v in ends.items()})
               for i in range(max(map(len, ends.values()), default=1))], skip=False)  # fmt: skip

    def ask(self) -> Request | None:
        """The request of the next trial; None while one is under way, and when the budget is spent."""
        if self._trials_spent():
            return self._ask_last_round()
        if self.under_way:
            return None
        self.optuna_trial = self.study.ask(
            fixed_distributions={k: _distribution(v) for k, v in self.space.items()}
        )
        self.under_way = [self._trial_request(self._values())]
        return self.under_way[0]

    def _trials_spent(self) -> bool:
        out_of_time = self.search.seconds is not None and self.spent["seconds"] >= self.search.seconds
        return not self.space or len(self.trials) >= self.search.trials or out_of_time

    def _ask_last_round(self) -> Request | None:
        """By loss, a trial of the best values with another seed; None when all are under way."""
        if not self.by_loss or not self.space:
            return None
        if self.last_round is None:
            by_values = {repr(t.values): t for t in self.tried if t.mean is not None}
            finalists = sorted(by_values.values(), key=lambda t: t.rank)[:FINALISTS]
            other_seeds = range(self.search.seed + 1, self.search.seed + LAST_ROUND_SEEDS)
            self.last_round = [self._trial_request(t.values, s) for t in finalists for s in other_seeds]
        if not self.last_round:
            return None
        self.under_way.append(self.last_round.pop(0))
        return self.under_way[-1]

    @property
    def done(self) -> bool:
        """Whether no trial is under way and none is left."""
        compared = self.last_round == [] or not self.by_loss or not self.space
        return not self.under_way and self._trials_spent() and compared

    def begin(self, out: Path) -> None:
        """Nothing: workers find the trials that are on record."""

    def _values(self) -> dict[str, Any]:
        """The values of the current trial. Of a list, Optuna chooses an index: items may be of any type."""
        return {
            k: v if isinstance(self.space[k], Range) else self.space[k][v]
            for k, v in self.optuna_trial.params.items()
        }

    def _trial_request(self, values: dict[str, Any], seed: int | None = None) -> Request:
        """The request of a trial: `steps` of training, measured on held-out training rows."""
        return searches.trial(
            self.request, values, steps=self.steps, seed=self.search.seed if seed is None else seed,
            hold_out=self.hold_out, loss_only=self.by_loss,
        )  # fmt: skip

    def default_trial(self) -> Request:
        """A trial with the request's own values, for estimates of time and memory."""
        return self._trial_request({})

    def tell(self, record: Record | None, request: Request | None = None) -> None:
        """Report the record of the trial under way; a failed one counts towards the budget."""
        self.spent["trials"] += 1
        self.spent["steps"] += self.steps
        self.spent["seconds"] = round(self.spent["seconds"] + ((record and record.train_seconds) or 0.0), 3)
        if self.last_round is not None:
            under_way = next(r for r in self.under_way if r == request)
            self.under_way.remove(under_way)
            self._finalist(under_way).add(record)
            return
        self.under_way = []
        self._tell_optuna(record)

    def _tell_optuna(self, record: Record | None) -> None:
        """Report the trial to Optuna, which maximises."""
        import optuna

        score, values = self._measured(record), self._values()
        if score is None:
            self.study.tell(self.optuna_trial, state=optuna.trial.TrialState.FAIL)
            self.last_failure = (record and record.reason) or "it is not on record"
        else:
            self.study.tell(self.optuna_trial, score if self.higher_is_better else -score)
            self.metric = record.result.metric if record.result else None
        self.trials.append({"values": values, "score": score})
        if self.by_loss:
            self.tried.append(Tried(values, self.steps))
            self.tried[-1].add(record)

    def _measured(self, record: Record | None) -> float | None:
        """The score of the trial, or its held-out loss; None if it failed."""
        if self.by_loss:
            return searches.held_out_loss(record)
        return record.result.value if record and record.status == "ok" and record.result else None

    def _finalist(self, request: Request) -> Tried:
        """The values of a trial of the last round."""
        return next(t for t in self.tried if searches.with_values(request, t.values) == request)

    def outline(self, out: Path) -> list[tuple[str, Request, int, bool]]:
        """What is done and to do, for a plan: (kind, a request like it, how many, whether on record)."""
        done, left = self.replay(out)
        rows = [("trial", self.default_trial(), done, True)] if done else []
        if left:
            rows.append(("trial", self.default_trial(), left, False))
            return [*rows, ("after the search", self.request, len(self.seeds), False)]
        return rows + [("run", request, 1, False) for request in self.final_requests()]

    def left(self) -> tuple[int, int]:
        """Trials that are expected to follow, and their steps."""
        if not self.space or self.done:
            return 0, 0
        last_round = FINALISTS * (LAST_ROUND_SEEDS - 1) if self.by_loss else 0
        trials = max(self.search.trials + last_round - self.spent["trials"], 0)
        return trials, trials * self.steps

    def replay(self, out: Path) -> tuple[int, int]:
        """Repeat the search with the trials on record in `out`. Returns (finished trials, trials left)."""
        folder, cache = out if self.by_loss else out / "tuning", LookupCache()
        while (trial := self.ask()) is not None:
            record = new_record(Plan(trial, cache))
            if not is_on_record(folder, record):
                return self.spent["trials"], self.left()[0]
            self.tell(read_record(folder, record)[0], trial)
        return self.spent["trials"], 0

    def final_requests(self) -> list[Request]:
        """The runs with the best values, one per seed; [] if no trial has a result."""
        if not self.space:
            return [replace(self.request, seed=s) for s in self.seeds]
        facts = self._choice()
        if facts is None:
            return []
        facts = {"budget": self.budget(), "used": self.spent, **facts}
        return [
            replace(searches.with_values(self.request, facts["chosen"]), seed=s, tuning=facts)
            for s in self.seeds
        ]

    def _choice(self) -> dict[str, Any] | None:
        """The best values and what was tried, for the record; None if no trial has a result."""
        if self.by_loss:
            most = max((len(t.losses) for t in self.tried), default=0)
            best = searches.best(t for t in self.tried if len(t.losses) == most)
            default = {"default": {"lr": self.default_lr}} if "lr" in self.space else {}
            tried = [t.facts() for t in self.tried]
            return best and default | searches.choice(best) | {"tried": tried}
        scored = [t for t in self.trials if t["score"] is not None]
        if not scored:
            return None
        sign = 1 if self.higher_is_better else -1
        best = max(scored, key=lambda t: sign * t["score"])
        return {"chosen": best["values"], "score": best["score"], "metric": self.metric, "tried": self.trials}

    def budget(self) -> dict[str, Any]:
        """The budget and the space of the search, for the record; the budget is the same for every method."""
        s = self.search
        space = {k: v.model_dump() if isinstance(v, Range) else v for k, v in self.space.items()}
        budget = {"trials": s.trials, "steps": self.steps, "seconds": s.seconds, "sampler": s.sampler,
                  "rows": self.hold_out[0], "seed": s.seed, "space": space}  # fmt: skip
        last_round = {"finalists": FINALISTS, "seeds": LAST_ROUND_SEEDS}
        return budget | ({"by": "loss", "last_round": last_round} if self.by_loss else {})


def _distribution(values: Range | list[Any]) -> Any:
    """Optuna's distribution for a range; for a list, one over its indices."""
    from optuna import distributions

    if not isinstance(values, Range):
        return distributions.CategoricalDistribution(tuple(range(len(values))))
    is_integer = isinstance(values.low, int) and isinstance(values.high, int)
    distribution = distributions.IntDistribution if is_integer else distributions.FloatDistribution
    return distribution(values.low, values.high, log=values.log)


def _import_optuna() -> Any:
    """The module `optuna`. Raises `UserError` if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise not_installed("optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
