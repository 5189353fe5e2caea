"""Hyperparameter search with Optuna: the same budget for every method, scored on held-out training rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peftzoo.errors import UserError
from peftzoo.records import store
from peftzoo.records.schema import Record
from peftzoo.runs.plan import Plan, Request, resolve
from peftzoo.runs.run import new_record
from peftzoo.sweeps.sweep_file import Range, Search

LR_FACTOR = 10.0
"""Without a search space, the learning rate is searched from 1/10 of the method's default to 10 times it."""


class Study:
    """The search for one method, task and model, as a loop of `ask` and `tell` (the names are Optuna's).

    Trials run one at a time, so that the search is deterministic: it depends on its seed and the trials'
    scores alone. Every trial is on record; an interrupted search starts again and finds the finished trials.

    `search` is the budget, `request` the run whose options are searched, `seeds` those of the final runs.
    """

    def __init__(self, search: Search, request: Request, seeds: list[int]) -> None:
        optuna = _import_optuna()
        self.search, self.request, self.seeds = search, request, seeds
        plan = Plan(request)
        steps = search.steps or plan.train_config.steps
        self.space = self._method_space(plan)
        self.steps = steps if plan.cls.trains else plan.train_config.steps
        samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        self.study = optuna.create_study(
            direction="maximize", sampler=samplers[search.sampler](seed=search.seed)
        )
        self.trials: list[dict[str, Any]] = []
        """Values and score of each finished trial; the score is None if it failed."""
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
        """The request of the next trial, or None when the budget is spent."""
        out_of_time = self.search.seconds is not None and self.spent["seconds"] >= self.search.seconds
        if not self.space or len(self.trials) >= self.search.trials or out_of_time:
            return None
        self.optuna_trial = self.study.ask(
            fixed_distributions={k: _distribution(v) for k, v in self.space.items()}
        )
        return self._trial_request(self._values())

    def _values(self) -> dict[str, Any]:
        """The values of the current trial. Of a list, Optuna chooses an index: items may be of any type."""
        return {
            k: v if isinstance(self.space[k], Range) else self.space[k][v]
            for k, v in self.optuna_trial.params.items()
        }

    def _trial_request(self, values: dict[str, Any]) -> Request:
        """The request of a trial: `steps` of training, scored on held-out training rows."""
        train = self._with_values(values).train | {"steps": self.steps}
        train.pop("epochs", None)
        hold_out = (self.search.rows, self.search.seed)
        return replace(
            self._with_values(values), train=train, seed=self.search.seed, hold_out=hold_out, limit=None
        )

    def default_trial(self) -> Request:
        """A trial with the request's own values, for estimates of time and memory."""
        return self._trial_request({})

    def _with_values(self, values: dict[str, Any]) -> Request:
        """The request with these values; `set.NAME` is an option of the method, else a training setting."""
        r = self.request
        options = {k.removeprefix("set."): v for k, v in values.items() if k.startswith("set.")}
        train = {k: v for k, v in values.items() if not k.startswith("set.")}
        return replace(r, options=r.options | options, train=r.train | train)

    def tell(self, record: Record | None) -> None:
        """Report the record of the current trial; a failed one counts towards the budget."""
        import optuna

        score = record.result.value if record and record.status == "ok" and record.result else None
        if score is None:
            self.study.tell(self.optuna_trial, state=optuna.trial.TrialState.FAIL)
            self.last_failure = (record and record.reason) or "it is not on record"
        else:
            self.study.tell(self.optuna_trial, score)
            self.metric = record.result.metric
        self.trials.append({"values": self._values(), "score": score})
        self.spent["trials"] += 1
        self.spent["steps"] += self.steps
        self.spent["seconds"] = round(self.spent["seconds"] + ((record and record.train_seconds) or 0.0), 3)

    def replay(self, out: Path) -> tuple[int, int]:
        """Repeat the search with the trials on record in `out`. Returns (finished trials, trials left)."""
        while (trial := self.ask()) is not None:
            file = store.path(out, new_record(Plan(trial)))
            if not file.is_file():
                return len(self.trials), self.search.trials - len(self.trials)
            self.tell(store.read(file))
        return len(self.trials), 0

    def final_requests(self) -> list[Request]:
        """The runs with the best values, one per seed; [] if no trial has a score."""
        if not self.space:
            return [replace(self.request, seed=s) for s in self.seeds]
        scored = [t for t in self.trials if t["score"] is not None]
        if not scored:
            return []
        best = max(scored, key=lambda t: t["score"])
        facts = {
            "budget": self.budget(), "used": self.spent, "chosen": best["values"], "score": best["score"],
            "metric": self.metric, "tried": self.trials,
        }  # fmt: skip
        return [replace(self._with_values(best["values"]), seed=s, tuning=facts) for s in self.seeds]

    def budget(self) -> dict[str, Any]:
        """The budget and the space of the search, for the record; the budget is the same for every method."""
        s = self.search
        space = {k: v.model_dump() if isinstance(v, Range) else v for k, v in self.space.items()}
        return {"trials": s.trials, "steps": self.steps, "seconds": s.seconds, "sampler": s.sampler,
                "rows": s.rows, "seed": s.seed, "space": space}  # fmt: skip


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
        raise UserError('a search needs Optuna: pip install "peftzoo[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
