"""Searching options with Optuna: the same budget for every method, and never a look at the scored rows."""

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

WIDTH = 10.0
"""A learning rate is searched from this part of the method's own to this multiple of it, unless told."""


class Study:
    """The search for one method, task and model: one trial at a time, so that it can be done again alike.

    Everything follows from the seed and the trials' scores, and every trial is on record: a search that was
    interrupted begins anew and finds the trials that it has done.
    """

    def __init__(self, search: Search, request: Request, seeds: list[int]) -> None:
        optuna = _optuna()
        self.search, self.request, self.seeds = search, request, seeds
        plan = Plan(request)
        steps = search.steps or plan.config.steps
        self.space = self._own_space(plan)
        self.steps = steps if plan.cls.trains else plan.config.steps
        samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        self.study = optuna.create_study(
            direction="maximize", sampler=samplers[search.sampler](seed=search.seed)
        )
        self.tried: list[dict[str, Any]] = []
        self.used = {"trials": 0, "steps": 0, "seconds": 0.0}
        self.last, self.metric, self.trial = "none was made", None, None

    @property
    def title(self) -> str:
        return f"{self.request.method} on {self.request.task}"

    def _own_space(self, plan: Plan) -> dict[str, Any]:
        """What of the space concerns this method; an option told for it goes before that for all."""
        method, given = self.request.method, self.search.space
        if not given and plan.cls.trains:
            lr = plan.config.lr
            return {"lr": Range(low=lr / WIDTH, high=lr * WIDTH, log=True)}
        found: dict[str, Any] = {}
        for key, span in sorted(given.items(), key=lambda item: item[0].count(".")):
            owner, _, option = key.removeprefix("set.").rpartition(".")
            if key.startswith("set.") and owner in ("", method):
                found[f"set.{option}"] = span
            elif not key.startswith("set.") and plan.cls.trains:
                found[key] = span
        return found

    def check(self) -> None:
        """Try the ends of each span and all listed values: raises the `UserError` of one that the method does
        not take."""
        ends = {k: [v.low, v.high] if isinstance(v, Range) else v for k, v in self.space.items()}
        resolve([self._trial({k: v[i % len(v)] for k, v in ends.items()})
               for i in range(max(map(len, ends.values()), default=1))], skip=False)  # fmt: skip

    def ask(self) -> Request | None:
        """The next trial, or None when the budget is used."""
        spent = self.search.seconds is not None and self.used["seconds"] >= self.search.seconds
        if not self.space or len(self.tried) >= self.search.trials or spent:
            return None
        self.trial = self.study.ask(fixed_distributions={k: _distribution(v) for k, v in self.space.items()})
        return self._trial(self._values())

    def _values(self) -> dict[str, Any]:
        """The trial's values; of choices Optuna sees the place in the list, which may hold anything."""
        return {
            k: v if isinstance(self.space[k], Range) else self.space[k][v]
            for k, v in self.trial.params.items()
        }

    def _trial(self, values: dict[str, Any]) -> Request:
        train = self._with(values).train | {"steps": self.steps}
        train.pop("epochs", None)
        held = (self.search.rows, self.search.seed)
        return replace(self._with(values), train=train, seed=self.search.seed, hold_out=held, limit=None)

    def sample(self) -> Request:
        """A trial with the method's own values, for an estimate."""
        return self._trial({})

    def _with(self, values: dict[str, Any]) -> Request:
        """The request with the values put in."""
        r = self.request
        options = {k.removeprefix("set."): v for k, v in values.items() if k.startswith("set.")}
        train = {k: v for k, v in values.items() if not k.startswith("set.")}
        return replace(r, options=r.options | options, train=r.train | train)

    def tell(self, record: Record | None) -> None:
        """What became of the trial; one that failed counts as used."""
        import optuna

        score = record.result.value if record and record.status == "ok" and record.result else None
        if score is None:
            self.study.tell(self.trial, state=optuna.trial.TrialState.FAIL)
            self.last = (record and record.reason) or "it is not on record"
        else:
            self.study.tell(self.trial, score)
            self.metric = record.result.metric
        self.tried.append({"values": self._values(), "score": score})
        self.used["trials"] += 1
        self.used["steps"] += self.steps
        self.used["seconds"] = round(self.used["seconds"] + ((record and record.train_seconds) or 0.0), 3)

    def replay(self, out: Path) -> tuple[int, int]:
        """Go through the trials that are on record in `out`: how many there are, and how many are left."""
        while (trial := self.ask()) is not None:
            place = store.path(out, new_record(Plan(trial)))
            if not place.is_file():
                return len(self.tried), self.search.trials - len(self.tried)
            self.tell(store.read(place))
        return len(self.tried), 0

    def settled(self) -> list[Request]:
        """The final runs with the best values, one per seed; none where no trial gave a score."""
        if not self.space:
            return [replace(self.request, seed=s) for s in self.seeds]
        known = [t for t in self.tried if t["score"] is not None]
        if not known:
            return []
        best = max(known, key=lambda t: t["score"])
        facts = {
            "budget": self.budget(), "used": self.used, "chosen": best["values"], "score": best["score"],
            "metric": self.metric, "tried": self.tried,
        }  # fmt: skip
        return [replace(self._with(best["values"]), seed=s, tuning=facts) for s in self.seeds]

    def budget(self) -> dict[str, Any]:
        """What every method's search was given."""
        s = self.search
        space = {k: v.model_dump() if isinstance(v, Range) else v for k, v in self.space.items()}
        return {"trials": s.trials, "steps": self.steps, "seconds": s.seconds, "sampler": s.sampler,
                "rows": s.rows, "seed": s.seed, "space": space}  # fmt: skip


def _distribution(values: Range | list[Any]) -> Any:
    from optuna import distributions

    if not isinstance(values, Range):
        return distributions.CategoricalDistribution(tuple(range(len(values))))
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    return kind(values.low, values.high, log=values.log)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError('a search needs Optuna: pip install "peftzoo[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
