"""Searches by held-out loss: the grid of learning rates, Optuna by loss, trials on record, and `tune`."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from peftzoo.boards import tables
from peftzoo.cli import sweep as sweep_command
from peftzoo.errors import UserError
from peftzoo.records import store, trials
from peftzoo.runs import packs, run, runner
from peftzoo.runs.plan import LookupCache, Plan, Request
from peftzoo.scoring import evaluation
from peftzoo.sweeps import lr_grid, sweep_file
from peftzoo.sweeps.executor import JobResult
from peftzoo.sweeps.lr_grid import FACTOR, MAX_ADDED, LrGrid
from peftzoo.sweeps.study import Study
from tests.boards.test_tables import make as make_scored
from tests.records.test_store import make
from tests.sweeps.test_sweep import Inline
from tests.sweeps.test_sweep import Scheduler as SweepScheduler

START = 2.0
"""The held-out loss before training, in trials that are not run."""
BASE = Request("lora", "sst2", train={"steps": 80, "batch_size": 2}, precision="fp32", limit=4)


CACHE = LookupCache()


def grid(n: int = 7, base: Request = BASE, seeds: tuple[int, ...] = (0, 1), cache=CACHE, **keys) -> LrGrid:
    return LrGrid(sweep_file.Search(lr_grid=n, **keys), base, [*seeds], cache)


def result(loss: float | None, start: float = START, **changes):
    """The record of a trial that is not run."""
    held_out = {"rows": 8, "start_loss": start, "loss": loss}
    status = {"status": "failed", "reason": "loss is nan at step 3"} if loss is None else {}
    return make(score=None, held_out=held_out, train_seconds=1.5, **status | changes)


def point(search: LrGrid, request: Request) -> int:
    """The number of the request's rate; 0 is the default."""
    return round(math.log(request.train["lr"] / search.lr) / math.log(FACTOR))


def drive(search, loss, rng: random.Random | None = None) -> list[Request]:
    """Every trial of the search, which gets `loss(request)`; in any order with `rng`. None is run."""
    asked, open_requests = [], []
    while True:
        while (request := search.ask()) is not None:
            open_requests.append(request)
            asked.append(request)
        if not open_requests:
            assert search.done
            return asked
        request = open_requests.pop(rng.randrange(len(open_requests)) if rng else 0)
        assert not search.done
        search.tell(result(loss(request)), request)


# -- the grid -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", range(-9, 10))
def test_a_best_rate_on_the_edge_widens_the_grid(best: int) -> None:
    """Wherever the optimum lies, within reach; the rates around the chosen one trained as long as it did."""
    search = grid(7)
    asked = drive(search, lambda r: 0.5 + 0.1 * abs(point(search, r) - best))
    reach = 3 + MAX_ADDED
    assert search.chosen().values == {"lr": search.rate(max(-reach, min(reach, best)))}
    last = [r for r in asked if r.train["steps"] == 80]
    seeds = {
        p: {r.seed for r in last if point(search, r) == p} for p in map(lambda r: point(search, r), last)
    }
    assert all(s == {1000, 1001, 1002} for s in seeds.values())
    at_edge = search.final_requests()[0].tuning.get("at_edge", False)
    assert at_edge == (abs(best) >= reach), "the record says that the best may lie further out"
    if abs(best) < reach:
        assert {best - 1, best, best + 1} <= {*seeds}, "the best lies between two others"
    assert len({(r.train["lr"], r.train["steps"], r.seed) for r in asked}) == len(asked), "a trial twice"


@pytest.mark.parametrize("n", [2, 3, 4, 7, 12])
def test_each_round_keeps_the_better_half(n: int) -> None:
    search, rng = grid(n), random.Random()
    losses = {p: rng.random() for p in range(-30, 30)}
    asked = drive(search, lambda r: losses[point(search, r)])
    rounds = [{point(search, r) for r in asked if r.train["steps"] == s} for s in (20, 40, 80)]
    best = lambda points, k: {*sorted(points, key=losses.get)[:k]}  # noqa: E731
    assert rounds[0] == {*range(-(n // 2), n - n // 2)}
    assert rounds[1] == best(rounds[0], -(-n // 2)) and best(rounds[1], -(-len(rounds[1]) // 2)) <= rounds[2]
    assert [len([r for r in asked if r.train["steps"] == s]) for s in (20, 40)] == [n, -(-n // 2)]
    assert search.spent["trials"] == len(asked) <= search.budget()["trials"]
    assert search.spent["steps"] == sum(r.train["steps"] for r in asked)
    chosen = search.chosen().values["lr"]
    assert chosen == search.rate(min(rounds[2], key=losses.get)), "not the best of the last round"


def test_rates_are_a_factor_apart_around_the_default() -> None:
    search = grid(7)
    default = Plan(BASE).train_config.lr
    assert search.rate(0) == default == search.lr
    rates = sorted({r.train["lr"] for r in itertools.islice(iter(search.ask, None), 7)})
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([10**0.5] * 6, rel=1e-3)
    assert rates[3] == default


@pytest.mark.parametrize("seed", [1000, 1001, 1002])
@pytest.mark.parametrize("loss", [None, START + 1e-6, 50.0])
def test_a_rate_at_which_a_seed_breaks_down_is_not_chosen(seed: int, loss: float | None) -> None:
    """The optimum but for one seed at the full steps, whichever it is."""

    def losses(r: Request) -> float | None:
        p = point(search, r)
        if (p, r.seed, r.train["steps"]) == (1, seed, 80):
            return loss
        return -10.0 if p == 1 else 0.5 + 0.1 * abs(p)

    search = grid(5)
    drive(search, losses)
    assert search.chosen().values == {"lr": search.lr}
    facts = search.final_requests()[0].tuning
    broken = [t for t in facts["tried"] if t.get("breakdowns")]
    assert [t["values"]["lr"] for t in broken] == [search.rate(1)] and "breakdowns" not in facts


def test_where_every_rate_breaks_down_the_record_says_so() -> None:
    search = grid(3)
    drive(search, lambda r: START + 1 + 0.1 * abs(point(search, r)))
    facts = search.final_requests()[0].tuning
    assert facts["chosen"] == {"lr": search.lr} and facts["breakdowns"] == 3
    search = grid(3)
    drive(search, lambda r: None)
    assert search.final_requests() == [] and "loss is nan" in search.last_failure


def test_what_is_chosen_does_not_depend_on_the_order_of_the_trials() -> None:
    rng = random.Random()
    losses = {k: rng.random() for k in itertools.product(range(-30, 30), (20, 40, 80), (1000, 1001, 1002))}
    found = []
    for order in (None, random.Random(1), random.Random(2)):
        search = grid(7)
        asked = drive(search, lambda r, s=search: losses[point(s, r), r.train["steps"], r.seed], order)
        found.append((search.final_requests(), Counter(map(repr, asked))))
    assert found[0] == found[1] == found[2]


def test_final_runs_have_the_values_the_budget_and_other_seeds() -> None:
    bases = [replace(BASE, method=m) for m in ("lora", "ia3", "vera")]
    searches = [grid(4, b, (0, 5)) for b in bases]
    for s in searches:
        drive(s, lambda r, s=s: abs(point(s, r)) + 0.1)
    finals = [s.final_requests() for s in searches]
    for search, requests in zip(searches, finals, strict=True):
        assert [r.seed for r in requests] == [0, 5] and {r.train["lr"] for r in requests} == {search.lr}
        assert all(r.hold_out is None and not r.loss_only and r.limit == 4 for r in requests)
        tuning = requests[0].tuning
        assert tuning["chosen"] == tuning["default"] == {"lr": search.lr} and tuning["loss"] == 0.1
        json.dumps(tuning, allow_nan=False)
    budgets = [{k: v for k, v in f[0].tuning["budget"].items() if k != "space"} for f in finals]
    assert budgets[0] == budgets[1] == budgets[2] and budgets[0]["rows"] == 1000
    records = [make_scored(r.method, r.seed, 0.5, tuning=r.tuning, train={"lr": r.train["lr"]})
               for f in finals for r in f]  # fmt: skip
    assert len(tables.tables(records)) == 1, "methods with the same budget share a table"


def test_mistakes_of_a_search_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="seed 1001 is one of the search's own"):
        grid(3, seeds=(0, 1001))
    untrained = grid(3, replace(BASE, method="none"))
    assert untrained.ask() is None and untrained.done and len(untrained.final_requests()) == 2


WRONG_FILES = {
    "both kinds": ({"lr_grid": 3, "trials": 2}, "give either trials or lr_grid"),
    "no kind": ({"steps": 3}, "give either trials or lr_grid"),
    "a space": ({"lr_grid": 3, "space": {"lr": [1e-3]}}, "space is for trials"),
    "seconds": ({"lr_grid": 3, "seconds": 3}, "seconds is for trials"),
    "one rate": ({"lr_grid": 1}, "search.lr_grid: .*greater than or equal to 2"),
    "by score": ({"lr_grid": 3, "by": "score"}, "searched by loss"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_mistake_in_a_sweep_file_is_named(tmp_path, kind: str) -> None:
    keys, message = WRONG_FILES[kind]
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({"methods": "lora", "tasks": "sst2", "search": keys}))
    with pytest.raises(UserError, match=message):
        sweep_file.read(file)


def test_a_sweep_file_searches_a_grid(tmp_path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({"methods": "lora,ia3", "tasks": "sst2", "search": {"lr_grid": 3}}))
    spec = sweep_file.read(file)
    found = sweep_command.make_searches(spec.search, spec.requests(), spec.seeds)
    assert [(type(s), s.request.method, len(s.grid)) for s in found] == [
        (LrGrid, "lora", 3),
        (LrGrid, "ia3", 3),
    ]
    assert found[0].hold_out == (1000, 1000)


# -- rows that are held out -----------------------------------------------------------------------------


def test_the_loss_before_training_is_measured_once_per_seed(tmp_path) -> None:
    search = grid(3)
    asked = drive(search, lambda request: 1.0)
    assert asked[0].start_loss is None and asked[-1].start_loss == START
    request = next(r for r in asked if r.start_loss == START)
    assert request.seed == asked[0].seed
    train = {"steps": 1, "batch_size": 2, "lr": 1e-3}
    known = replace(request, train=train, hold_out=(8, 1000), start_loss=9.0)
    measured = replace(known, start_loss=None)
    assert Plan(known).identity() == Plan(measured).identity()
    records = [run.run(r, tmp_path / str(i))[0] for i, r in enumerate((known, measured))]
    assert records[0].held_out["start_loss"] == 9.0 != records[1].held_out["start_loss"]
    assert records[0].held_out["loss"] == records[1].held_out["loss"]
    assert records[0].held_out["rows"] == records[1].held_out["rows"]


@pytest.mark.parametrize("wanted", [2, 1000, 10**6])
def test_at_most_half_of_the_rows_are_held_out(wanted: int) -> None:
    search = grid(3, rows=wanted)
    data = Plan(search.ask()).data
    total = data.trained_rows + data.scored_rows
    assert data.scored_rows == min(wanted, data.scored_rows) <= total / 2
    assert data.scored_rows == wanted or data.scored_rows > 0.4 * total


# -- trials on record -----------------------------------------------------------------------------------


def losses_of(r: Request) -> float:
    """A loss that depends on rate, steps and seed: three rates around 1e-3, and the best is 1e-2."""
    return abs(math.log10(r.train["lr"] / 1e-2)) / 4 + r.seed % 3 / 100 + 1 / r.train["steps"]


class Killed(Exception):
    """The program dies."""


class Fake:
    """The result of each job without a run: a trial gets `losses_of`, as a worker puts it on record."""

    def __init__(self, out, cache: LookupCache, kill_at: int = -1, half_written: bool = False) -> None:
        self.out, self.cache, self.kill_at, self.half_written = out, cache, kill_at, half_written
        self.trained: list[Request] = []

    def __call__(self, job) -> JobResult:
        if len(self.trained) == self.kill_at:
            for file in self.out.rglob("*.jsonl") if self.half_written else ():
                file.write_bytes(file.read_bytes()[:-20])
            raise Killed
        records = [self.do(request) for request in job.requests]
        return JobResult(job, records[0], companion_results=[(r, True) for r in records[1:]])

    def do(self, request: Request):
        record = run.new_record(Plan(request, self.cache))
        self.trained.append(request)
        if request.loss_only:
            record.held_out = {"rows": 8, "start_loss": START, "loss": losses_of(request)}
            record.train_seconds = 1.0
            trials.add(self.out, record)
        return record


def scheduled(out, base: Request, fake: Fake):
    scheduler = SweepScheduler(Inline(fake), out, lambda *_: None, lambda _: None)
    search = grid(3, base, cache=fake.cache)
    scheduler.run([], [search])
    return search, [r for r, _, _ in scheduler.records]


@pytest.mark.long
@pytest.mark.parametrize("half_written", [False, True], ids=["whole", "half"])
def test_a_search_that_is_killed_anywhere_goes_on_without_training_again(
    tmp_path, half_written: bool
) -> None:
    cache = LookupCache()
    whole = Fake(tmp_path / "whole", cache)
    search, _ = scheduled(tmp_path / "whole", BASE, whole)
    trained = [r for r in whole.trained if r.loss_only]
    assert len(trained) >= 3 + 2 + 9 and len(whole.trained) == len(trained) + 2
    for kill_at in range(len(trained) + 1):
        out = tmp_path / f"killed-{kill_at}"
        first, second = Fake(out, cache, kill_at, half_written), Fake(out, cache)
        with pytest.raises(Killed):
            scheduled(out, BASE, first)
        again, records = scheduled(out, BASE, second)
        lost = first.trained[-1:] if half_written else []
        done = Counter(repr(r) for r in (first.trained + second.trained) if r.loss_only)
        assert done == Counter(map(repr, trained)) + Counter(map(repr, lost)), kill_at
        assert again.final_requests() == search.final_requests() and len(records) == 2


def test_trials_of_a_round_go_together_in_a_pack(tmp_path) -> None:
    fake = Fake(tmp_path, LookupCache())
    scheduler = SweepScheduler(Inline(fake), tmp_path, lambda *_: None, lambda _: None)
    scheduler.run([], [grid(3)], (None, None))
    jobs = [len(j.requests) for j in scheduler.executor.jobs if j.request.loss_only]
    assert jobs[:2] == [3, 2] and sum(jobs) == len([r for r in fake.trained if r.loss_only])
    assert [len(j.requests) for j in scheduler.executor.jobs if not j.request.loss_only] == [1, 1]
    alone, _ = scheduled(tmp_path / "alone", BASE, Fake(tmp_path / "alone", LookupCache()))
    assert alone.final_requests()[0].train == scheduler.executor.jobs[-1].request.train


def test_a_worker_without_a_result_counts_as_a_trial_without_a_loss(tmp_path) -> None:
    fail = lambda job: JobResult(job, failure="its worker died")  # noqa: E731
    scheduler = SweepScheduler(Inline(fail), tmp_path, lambda *_: None, lambda _: None)
    scheduler.run([], [grid(2)])
    assert "gave a loss (its worker died)" in scheduler.lost_runs[0] and not scheduler.records
    assert not [*tmp_path.rglob("*.json*")], "a trial without an end is on record"


@pytest.mark.parametrize(
    "junk", [b"", b"{", b"[1]\n", b'{"id": 3}\n', b"\xff\xfe\n", b'{"id": "x", "seed": 0', b"null\n"]
)
@pytest.mark.parametrize("where", range(3))
def test_a_damaged_line_hides_no_other(tmp_path, junk: bytes, where: int) -> None:
    records = [result(0.1 * s, seed=s) for s in range(2)] + [result(None, seed=2)]
    for number, record in enumerate(records):
        file = trials.add(tmp_path, record)
        if number == where:
            file.write_bytes(file.read_bytes() + junk)
    for record in records:
        found = trials.find(tmp_path, result(9.0, seed=record.seed))
        assert found.held_out == record.held_out and found.reason == record.reason
        assert trials.add(tmp_path, record).read_bytes().count(f'"seed": {record.seed},'.encode()) == 1
    assert trials.find(tmp_path, result(9.0, seed=3)) is None
    assert trials.find(tmp_path, result(9.0, id="f" * 12)) is None


# -- a trial that is run --------------------------------------------------------------------------------


def trial(task: str, lr: float | None = None, **changes) -> Request:
    train = {"steps": 2, "batch_size": 2} | ({"lr": lr} if lr else {})
    return Request("lora", task, seed=1000, train=train, hold_out=(8, 1000), loss_only=True, **changes)


@pytest.mark.parametrize("task", ["sst2", "gsm8k", "stsb"])
def test_a_trial_measures_the_loss_and_nothing_else(tmp_path, monkeypatch, task: str) -> None:
    def refuse(*_args, **_options):
        raise AssertionError("scored or saved in a search")

    for place, name in (
        (evaluation, "score_language"), (evaluation, "score_head"), (runner.saving, "save"),
        (runner.counters, "generation_latency"), (runner.counters, "forward_latency"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, refuse)
    record, file, new = run.run(trial(task), tmp_path)
    losses = record.held_out
    assert (record.status, record.reason, new) == ("ok", None, True) and losses["rows"] == 8
    assert losses["loss"] != losses["start_loss"] and all(map(math.isfinite, losses.values()))
    kept = {p.parent.name for p in tmp_path.rglob("*") if p.is_file()}
    assert kept == {"locks", "embedded"} and len(file.read_text().splitlines()) == 1
    monkeypatch.setattr(run, "load_model", refuse)
    again, _, new = run.run(trial(task), tmp_path)
    assert again.held_out == losses and not new, "a trial on record is trained again"


def test_the_loss_before_training_is_that_of_the_model_itself(tmp_path) -> None:
    """Against transformers' own loss, one row at a time."""
    import torch

    plan = Plan(trial("gsm8k", lr=1e-9))
    record, _, _ = run.run(plan, tmp_path)
    loaded = run.load_model(plan)
    r = runner.Runner(plan, loaded, record, tmp_path, lambda *_: None, None, run.make_accelerator())
    total = count = 0
    for e in r.held_out_examples:
        ids, labels = torch.tensor([e.ids]), torch.tensor([e.labels])
        n = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(loaded.model(input_ids=ids, labels=labels).loss) * n
        count += n
    assert record.held_out["start_loss"] == pytest.approx(total / count, rel=1e-3)
    assert record.held_out["loss"] == pytest.approx(total / count, rel=1e-3), "a rate of nothing changes it"


def test_trials_in_a_pack_have_the_losses_that_they_have_alone(tmp_path) -> None:
    requests = [trial("gsm8k", lr, precision="fp32") for lr in (1e-3, 1e-2)]
    together = [r for r, _, _ in packs.run_packs(requests, tmp_path / "pack", size=2)]
    assert [r.packed["runs"] for r in together] == [2, 2]
    alone = [run.run(r, tmp_path / "alone")[0] for r in requests]
    for a, b in zip(together, alone, strict=True):
        assert a.held_out == pytest.approx(b.held_out, rel=1e-4) and a.id == b.id
    again = packs.run_packs(requests, tmp_path / "pack", size=2)
    assert [new for _, _, new in again] == [False, False]


def test_trials_have_ids_of_their_own_and_other_runs_keep_theirs() -> None:
    plain = Request("lora", "sst2")
    scored = replace(plain, hold_out=(8, 0))
    ids = [Plan(r).identity() for r in (plain, scored, replace(scored, loss_only=True))]
    assert len({*ids}) == 3
    assert "measured" not in Plan(scored).data.info["held_out"]


@pytest.mark.slow
def test_a_search_that_is_run_ends_in_runs_with_the_chosen_rate(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lr_grid, "MAX_ADDED", 1)
    base = replace(BASE, train={"steps": 2, "batch_size": 2})
    scheduler = SweepScheduler(Inline(), tmp_path, lambda *_: None, lambda _: None)
    search = grid(2, base, (0,), rows=8)
    scheduler.run([], [search])
    ((record, file, _),) = scheduler.records
    assert record.status == "ok" and record.train_config["lr"] == record.tuning["chosen"]["lr"]
    assert store.read(file).tuning["used"] == search.spent and record.score.rows == 4
    assert record.held_out is None and [*store.read_all(tmp_path)] == [record]


# -- Optuna by loss -------------------------------------------------------------------------------------


def optuna_study(**keys) -> Study:
    search = sweep_file.Search(**{"trials": 5, "by": "loss", "rows": 8} | keys)
    return Study(search, BASE, [0, 1])


def test_optuna_by_loss_compares_the_best_values_over_three_seeds() -> None:
    study = optuna_study()
    optimum = study.default_lr
    asked = drive(study, lambda r: abs(math.log10(r.train["lr"] / optimum)) / 4 + r.seed % 5 / 50)
    assert [r.seed for r in asked] == [1000] * 5 + [1001, 1002] * 2
    assert all(r.loss_only and r.hold_out == (8, 1000) for r in asked)
    ranked = sorted({r.train["lr"] for r in asked}, key=lambda lr: abs(math.log10(lr / optimum)))
    assert {r.train["lr"] for r in asked[5:]} == {*ranked[:2]}
    tuning = study.final_requests()[0].tuning
    assert tuning["chosen"] == {"lr": ranked[0]} and tuning["used"]["trials"] == 9
    assert tuning["budget"]["last_round"]["seeds"] == 3


@pytest.mark.parametrize("seed", [1000, 1001, 1002])
def test_optuna_by_loss_avoids_values_that_break_down(seed: int) -> None:
    study = optuna_study(space={"lr": [1e-4, 1e-3, 1e-2]}, trials=12, sampler="random")

    def loss(r: Request) -> float:
        broken = r.train["lr"] == 1e-2 and r.seed == seed
        return START + 1 if broken else {1e-4: 0.5, 1e-3: 0.4, 1e-2: -9.0}[r.train["lr"]]

    drive(study, loss)
    assert study.final_requests()[0].train["lr"] != 1e-2


def test_a_search_by_score_keeps_its_budget_and_prefers_what_the_task_prefers() -> None:
    for higher in (True, False):
        study = Study(sweep_file.Search(trials=4, rows=8), BASE, [0])
        study.higher_is_better = higher
        while (request := study.ask()) is not None:
            assert not request.loss_only
            study.tell(make(score={"metric": "acc", "value": request.train["lr"], "rows": 8}))
        lrs = [t["score"] for t in study.trials]
        assert study.final_requests()[0].train["lr"] == (max if higher else min)(lrs)
        assert {*study.budget()} == {"trials", "steps", "seconds", "sampler", "rows", "seed", "space"}


# -- the command ----------------------------------------------------------------------------------------

LINE = "tune --method lora --task sst2 --steps 8 --batch-size 2 --limit 4"


@pytest.mark.parametrize("kind", ["", "--trials 5"])
def test_a_dry_run_says_the_cost_and_does_nothing(run_cli, tmp_path, kind: str) -> None:
    code, shown, _ = run_cli(f"{LINE} {kind} --out {tmp_path / 'out'} --dry-run --json")
    plan = json.loads(shown)
    assert code == 0 and not (tmp_path / "out").exists()
    found = [(r["kind"], r["times"], r["steps"]) for r in plan["plan"]]
    trials_ = [("trial", 7, 2), ("trial", 4, 4), ("trial", 12, 8)] if not kind else [("trial", 9, 8)]
    assert found == [*trials_, ("after the search", 5, 8)]
    assert plan["total"]["steps"] == sum(n * s for _, n, s in found)


def test_the_final_runs_have_the_protocol_and_the_executor_that_is_asked_for(run_cli, tmp_path, monkeypatch):
    asked = []

    def run_sweep(requests, searches, out, workers, where, plugins, pack):
        asked.append((searches, where))
        return SimpleNamespace(records=[], lost_runs=[])

    monkeypatch.setattr(sweep_command, "run_sweep", run_sweep)
    monkeypatch.setattr("peftzoo.runs.quick_checks.check_installed", lambda package: None)
    options = "--protocol clean --executor ray --address auto"
    assert run_cli(f"{LINE} {options} --out {tmp_path / 'out'}")[0] == 0
    (((search,), where),) = asked
    assert where == ("ray", "auto")
    assert {r.protocol for r in drive(search, losses_of)} == {None}
    assert {r.protocol for r in search.final_requests()} == {"clean"}


WRONG = {
    "an empty grid": ("--lr-grid 0", '--lr-grid "0"'),
    "one rate": ("--lr-grid 1", '--lr-grid "1"'),
    "two kinds": ("--lr-grid 3 --trials 4", "keep one of them"),
    "a space of a grid": ("--space lr=1..2", "is for --trials N"),
    "a space without values": ("--trials 3 --space lr", "write KEY=VALUES"),
    "a space upside down": ("--trials 3 --space lr=2..1", "the lower first"),
    "a space of another": ("--trials 3 --space dora.r=1,2", 'unknown method in --space "dora.r=1,2"'),
    "an option": ("--trials 3 --space rank=1,2", "rank"),
    "a search's seed": ("--seeds 0,1002", "seed 1002 is one of the search's own"),
    "no rows": ("--hold-out 1", '--hold-out "1"'),
    "no rate": ("--method none", "does not train with a learning rate"),
    "no such protocol": ("--protocol best", 'unknown protocol "best"'),
    "no such executor": ("--executor slurm", 'unknown executor "slurm"'),
    "an address of nothing": ("--address auto", "is for --executor ray"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_is_one_line(run_cli, tmp_path, kind: str) -> None:
    options, message = WRONG[kind]
    line = LINE if "--method" not in options else LINE.replace("--method lora", "")
    code, shown, error = run_cli(f"{line} {options} --out {tmp_path / 'out'}")
    assert code == 2 and not shown and message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_progress_says_trials_done_and_the_time_left(capsys) -> None:
    search = grid(3)
    progress = sweep_command.SweepProgress(0, [search])
    assert progress.total == 3 + 2 + 9 + 2
    while (request := search.ask()) is not None:
        record = result(losses_of(request), train_config={"steps": request.train["steps"], "lr": 1e-3})
        search.tell(record, request)
        progress.on_record(record, True, True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == search.spent["trials"] and lines[0].startswith("[1/16] ")
    assert all("held-out loss" in line and " left" in line for line in lines)
    assert [int(line[1 : line.index("/")]) for line in lines] == [*range(1, len(lines) + 1)]
