"""Sweeps: the file and the plan it stands for, running it, estimates, searches."""

from __future__ import annotations

import json
import random
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from peftzoo.contract import registry
from peftzoo.errors import UserError
from peftzoo.records import store
from peftzoo.records.schema import Record, Score
from peftzoo.runs import run
from peftzoo.runs.estimates import Estimates
from peftzoo.runs.plan import Plan, Request, resolve
from peftzoo.sweeps import sweep_file
from peftzoo.sweeps.executor import Job, JobResult, execute
from peftzoo.sweeps.scheduler import MAX_ATTEMPTS, Scheduler
from peftzoo.sweeps.study import Study
from peftzoo.tasks import overlap, run_data, sources, splits, task_files
from tests.records.test_store import make

QUICK = {
    "methods": "lora",
    "tasks": "sst2",
    "steps": 2,
    "limit": 4,
    "precision": "fp32",
    "train": {"batch_size": 2},
}


def write_sweep(folder: Path, **keys) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(QUICK | keys))
    return path


class Inline:
    """An executor in this process. `fake_result(job)` may give the result of a job in place of doing it."""

    count, threads, jobs_per_device = 1, 1, 1

    def __init__(self, fake_result=lambda job: None) -> None:
        self.queue: deque[Job] = deque()
        self.fake_result, self.jobs = fake_result, []

    def submit(self, job: Job) -> None:
        self.queue.append(job)

    def next_result(self) -> JobResult:
        job = self.queue.popleft()
        self.jobs.append(job)
        return self.fake_result(job) or execute(job)

    def close(self) -> None: ...


def run_sweep(out: Path, requests=(), studies=(), **options) -> tuple[Scheduler, list[str]]:
    notes: list[str] = []
    scheduler = Scheduler(Inline(**options), out, lambda *_: None, notes.append)
    scheduler.run(requests, studies)
    return scheduler, notes


# -- the file -------------------------------------------------------------------------------------------


def test_the_plan_is_every_combination_once(tmp_path) -> None:
    rng = random.Random()
    methods = rng.sample(["lora", "dora", "vera", "ia3", "bitfit"], 3)
    seeds = rng.sample(range(50), 3)
    lrs, sizes = [rng.uniform(1e-4, 1e-2) for _ in range(2)], [2, 4, 8]
    keys = {"methods": methods, "tasks": "sst2, stsb", "seeds": [*seeds, seeds[0]]}
    runs = sweep_file.read(write_sweep(tmp_path, **keys, train={"lr": lrs, "batch_size": sizes})).requests()
    found = {(r.method, r.task, r.seed, r.train["lr"], r.train["batch_size"]) for r in runs}
    assert len(found) == len(runs) == 3 * 2 * 3 * 2 * 3
    assert {r.train["steps"] for r in runs} == {2} and {r.limit for r in runs} == {4}


def test_options_for_all_and_for_one(tmp_path) -> None:
    given = {"r": [2, 4], "dora.r": 8, "lora": {"alpha": [1, 2, 3]}}
    runs = sweep_file.read(write_sweep(tmp_path, methods=["lora", "dora"], set=given)).requests()
    assert [r.options for r in runs if r.method == "dora"] == [{"r": 8}]
    assert len({json.dumps(r.options) for r in runs if r.method == "lora"}) == 6


def test_commas_numbers_and_lists_mean_the_same(tmp_path) -> None:
    plans = [sweep_file.read(write_sweep(tmp_path, methods=m, seeds=s)).requests()
             for m, s in (("lora,dora", "1,2"), (["lora", "dora"], [1, 2]))]  # fmt: skip
    assert plans[0] == plans[1]
    assert [r.seed for r in sweep_file.read(write_sweep(tmp_path, seeds=3)).requests()] == [3]


def with_search(**keys) -> dict:
    return {"search": {"trials": 2} | keys}


def with_range(**keys) -> dict:
    return with_search(space={"lr": {"low": 1.0, "high": 2.0} | keys})


WRONG = {
    "a key": ({"method": "lora"}, 'unknown key "method": did you mean "methods"'),
    "a training key": ({"train": {"batchsize": 3}}, '"train.batchsize": did you mean "batch_size"'),
    "a search key": (with_search(sample="tpe"), 'unknown key "search.sample": did you mean "sampler"'),
    "a span's key": (with_range(hihg=3), 'unknown key "search.space.lr.hihg": did you mean "high"'),
    "a span upside down": (with_range(high=0.5), "above low"),
    "a log of nought": (with_range(low=0, log=True), "above 0"),
    "a searched budget": (with_search(space={"steps": [1, 2]}), 'unknown key "search.space.steps"'),
    "a grid and a search": (with_search() | {"set": {"r": [2, 4]}}, "put its values into search.space"),
    "no trials": (with_search(trials=0), "search.trials: .*greater than or equal to 1"),
    "a precision": ({"precision": "fp8"}, "precision: .*fp32"),
    "a seed": ({"seeds": [-1]}, "seeds.0: .*given: -1"),
    "a pack": ({"pack": 0}, 'pack "0": a number of runs from 1 on, auto, or a size'),
    "no method": ({"methods": []}, "methods: "),
    "steps twice": ({"train": {"steps": 3}}, "say the same"),
    "a method of set": (
        {"set": {"loraa.r": 3}},
        'unknown method in set "loraa.r" "loraa": did you mean "lora"',
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_is_named(tmp_path, kind: str) -> None:
    keys, message = WRONG[kind]
    with pytest.raises(UserError, match=message) as error:
        sweep_file.read(write_sweep(tmp_path, **keys))
    assert "sweep.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "a: !!python/object/apply:os.system ['x']", "\x00", "7"])
def test_a_file_that_is_no_sweep_is_named(tmp_path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        sweep_file.read(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="No such file"):
        sweep_file.read(tmp_path / "none.yaml")


@pytest.mark.parametrize(("keys", "message"), [
    ({"methods": "none, loraa"}, 'did you mean "lora"'), ({"tasks": "sst"}, "sst2"),
    ({"set": {"rank": 3}}, "rank"),
    ({"steps": None, "train": {"epochs": "many"}}, "--epochs many"),
    ({"steps": None, "train": {"epochs": -3}}, "--epochs -3"),
    ({"steps": None, "train": {"epochs": 1, "batch_size": 0}}, "--batch-size 0"),
    ({"train": {"lr": -1}}, "--lr -1"), ({"models": "embeded"}, 'did you mean "embedded"'),
    ({"protocol": "best"}, "protocol"), ({"save_every": 0}, "--save-every 0"), ({"limit": 0}, "--limit 0"),
    ({"search": {"trials": 2, "space": {"set.rank": [1, 2]}}}, "rank"),
    ({"search": {"trials": 2, "space": {"set.targets": ["q", "nowhere", "v"]}}}, "nowhere"),
])  # fmt: skip
def test_mistakes_show_before_the_first_run(run_cli, tmp_path, keys: dict, message: str) -> None:
    code, _, err = run_cli(f"sweep {write_sweep(tmp_path, **keys)} --out {tmp_path / 'out'}")
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_wrong_executors_are_named(run_cli, tmp_path) -> None:
    assert "executor" in run_cli(f"sweep {write_sweep(tmp_path)} --executor rya")[2]
    assert "--executor ray" in run_cli(f"sweep {write_sweep(tmp_path)} --address auto")[2]


# -- the plan -------------------------------------------------------------------------------------------


def dry_run(run_cli, tmp_path, **keys) -> dict:
    code, out, err = run_cli(
        f"sweep {write_sweep(tmp_path, **keys)} --out {tmp_path / 'out'} --dry-run --json"
    )
    assert code == 0, err
    return json.loads(out)


def test_the_plan_says_what_is_done_and_what_is_not_known(run_cli, tmp_path) -> None:
    first = dry_run(run_cli, tmp_path, seeds=[0, 1])
    assert not (tmp_path / "out").exists(), "a dry run leaves nothing"
    assert {r["seconds"] for r in first["plan"]} == {r["memory"] for r in first["plan"]} == {None}
    assert first["total"]["estimated"] == 0
    record, _, _ = run.run(sweep_file.read(write_sweep(tmp_path)).requests()[0], tmp_path / "out")
    again = dry_run(run_cli, tmp_path, seeds=[0, 1])
    assert [r["state"] for r in again["plan"]] == ["done", "to do"]
    assert [r["id"] for r in again["plan"]] == [record.id] * 2 == [r["id"] for r in first["plan"]]
    assert again["plan"][1]["basis"] == "from 1 record of lora"
    assert again["plan"][1]["memory"] == record.memory["computed_total"]
    code, out, _ = run_cli(f"sweep {write_sweep(tmp_path, seeds=[0, 1])} --out {tmp_path / 'out'} --dry-run")
    assert code == 0 and "2 runs, 1 done, 1 to do" in out and "from 1 record of lora" in out


def test_estimates_come_from_like_records_only() -> None:
    rng = random.Random()
    steps, rows, pace = rng.randint(10, 99), rng.randint(10, 99), rng.uniform(0.1, 2)
    planned = run.new_record(Plan(Request("lora", "sst2", train={"steps": steps}, limit=rows)))

    def past(times: float, **changes) -> Record:
        own = {"train_seconds": times * pace * 10, "train_config": planned.train_config | {"steps": 10},
               "data": planned.data | {"scored_rows": 20}, "memory": {"computed_total": round(1e6 * times)},
               "score": Score(metric="acc", value=0.5, rows=20, seconds=4.0)}  # fmt: skip
        return planned.model_copy(update=own | changes)

    estimates = Estimates(
        [past(1.0), past(3.0), past(2.0), past(50.0, task="stsb"), past(50.0, status="failed")]
    )
    found = estimates.for_run(planned)
    assert found.seconds == pytest.approx(2 * pace * steps + rows * 4.0 / 20, abs=0.06)
    assert found.memory == 3_000_000 and found.basis == "from 3 records of lora"
    same_family = next(
        m for m in registry.methods() if m != "lora" and registry.get(m).family == registry.get("lora").family
    )
    other = Estimates([past(1.0, method=same_family)]).for_run(planned)
    assert (
        "family" not in other.basis
        and other.basis.startswith("from 1 record of ")
        and "lora" not in other.basis
    )
    for unlike in (
        {"task": "stsb"},
        {"environment": {"device": "another"}},
        {"model": "m"},
        {"method": "gone"},
    ):
        assert Estimates([past(1.0, **unlike)]).for_run(planned).seconds is None


# -- running --------------------------------------------------------------------------------------------


def requests(**keys) -> list[Request]:
    return sweep_file.Sweep(**QUICK | keys).requests()


def test_every_run_is_done_once(tmp_path) -> None:
    wanted = requests(methods="lora,none")
    scheduler, _ = run_sweep(tmp_path, wanted)
    assert [(r.name, new) for r, _, new in scheduler.records] == [
        ("lora/sst2/embedded/s0", True), ("none/sst2/embedded/s0", True)
    ]  # fmt: skip
    again, _ = run_sweep(tmp_path, wanted)
    assert [new for _, _, new in again.records] == [False] * 2
    assert [r for r, _, _ in again.records] == [r for r, _, _ in scheduler.records]


BROKEN = """
from peftzoo.methods.lora import Adapter as LoRA, Config


class Broken(LoRA):
    name = "broken"

    def after_backward(self, step, total):
        raise MemoryError("no room for it") if self.config.r == 1 else ValueError("a plugin's mistake")
"""


@pytest.fixture
def broken(tmp_path, monkeypatch) -> str:
    from peftzoo.methods import lora

    source = next(
        n for n, c in vars(lora).items() if isinstance(c, type) and getattr(c, "name", "") == "lora"
    )
    file = tmp_path / "broken.py"
    file.write_text(BROKEN.replace("Adapter as LoRA", f"{source} as LoRA").replace(", Config", ""))
    monkeypatch.setattr(registry, "_plugin_files", {})
    registry.add_file(file)
    return str(file)


FRAGILE = """
from peftzoo.methods.lora import LoRA


class Fragile(LoRA):
    name = "fragile"

    def __init__(self, config):
        if config.r == 1:
            raise KeyError("no such rank")
        super().__init__(config)

    def part(self, site):
        raise RuntimeError("it looks at values")
"""


def test_a_plugin_that_breaks_when_attached_stops_no_other(run_cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_plugin_files", {})
    (tmp_path / "fragile.py").write_text(FRAGILE)
    registry.add_file(tmp_path / "fragile.py")
    fit, notes = resolve(requests(methods="fragile,lora"), skip=False)
    assert [p.request.method for p in fit] == ["fragile", "lora"] and not notes
    scheduler, _ = run_sweep(tmp_path / "out", [p.request for p in fit])
    assert [(r.method, r.status) for r, _, _ in scheduler.records] == [("fragile", "failed"), ("lora", "ok")]
    assert scheduler.records[0][0].reason.startswith("RuntimeError: it looks at values")
    file = write_sweep(tmp_path, methods="fragile", set={"r": 1})
    code, _, err = run_cli(f"sweep {file} --out {tmp_path / 'none'}")
    last = err.splitlines()[-1]  # after other libraries' bars
    assert code == 2 and '"fragile" breaks when it is made (KeyError' in last and "Traceback" not in err, err


def test_runs_that_fail_are_recorded_and_stop_no_other(tmp_path, broken) -> None:
    wanted = requests(methods="broken", set={"r": [1, 2]}) + requests()
    scheduler, _ = run_sweep(tmp_path, wanted)
    assert [r.status for r, _, _ in scheduler.records] == ["failed", "failed", "ok"]
    memory, mistake, _ = (r.reason for r, _, _ in scheduler.records)
    assert memory.startswith("MemoryError: no room") and mistake.startswith("ValueError: a plugin's mistake")
    assert len([*(tmp_path / "failed").rglob("*.json")]) == 2
    assert [r.method for r in store.read_all(tmp_path)] == ["lora"]


@pytest.mark.long
def test_runs_of_one_task_are_done_in_packs(tmp_path, broken) -> None:
    """One of them breaks its pack down; then they are done one by one."""
    good = requests(methods="lora,ia3", seeds=[0, 1])
    notes: list[str] = []
    scheduler = Scheduler(Inline(), tmp_path, lambda *_: None, notes.append)
    scheduler.run([*good, *requests(methods="broken")], pack=(4, None))
    assert [len(job.requests) for job in scheduler.executor.jobs] == [4, 1] and not scheduler.lost_runs
    assert [(r.method, r.status) for r, _, _ in scheduler.records] == [
        ("lora", "ok"), ("lora", "ok"), ("ia3", "ok"), ("ia3", "ok"), ("broken", "failed")
    ]  # fmt: skip
    assert all(r.packed["runs"] == 4 for r, _, _ in scheduler.records[:4])
    again = Scheduler(Inline(), tmp_path / "b", lambda *_: None, notes.append)
    again.run([*good[:2], *requests(methods="broken")], pack=(None, None))
    assert [r.status for r, _, _ in again.records] == ["ok", "ok", "failed"] and len(again.executor.jobs) == 1


def test_runs_of_a_pack_whose_worker_dies_are_done_one_by_one(tmp_path) -> None:
    unlucky, lucky = requests(seeds=[0, 1])

    def fake_result(job: Job) -> JobResult | None:
        return (
            JobResult(job, failure="its worker process was ended by SIGKILL")
            if unlucky in job.requests
            else None
        )

    notes: list[str] = []
    scheduler = Scheduler(Inline(fake_result), tmp_path, lambda *_: None, notes.append)
    scheduler.run([unlucky, lucky], pack=(2, None))
    assert sorted((r.seed, r.status) for r, _, _ in scheduler.records) == [(0, "failed"), (1, "ok")]
    assert "and 1 more" in notes[0] and "one by one" in notes[0] and not scheduler.lost_runs
    assert len(scheduler.executor.jobs) == 1 + MAX_ATTEMPTS + 1


def test_a_run_that_works_at_last_leaves_no_failure_behind(tmp_path) -> None:
    (request,) = requests()
    run.record_failure(request, tmp_path, "its worker died")
    assert len([*(tmp_path / "failed").rglob("*.json")]) == 1
    scheduler, _ = run_sweep(tmp_path, [request])
    assert scheduler.records[0][0].status == "ok" and not [*(tmp_path / "failed").rglob("*.json")]


def test_a_run_whose_worker_dies_is_tried_again_and_then_recorded(tmp_path) -> None:
    unlucky, lucky = requests(seeds=[0, 1])

    def fake_result(job: Job) -> JobResult | None:
        dies = job.request == unlucky or job.attempts == 0
        return JobResult(job, failure="its worker process was ended by SIGKILL") if dies else None

    scheduler, notes = run_sweep(tmp_path, [unlucky, lucky], fake_result=fake_result)
    found = {r.seed: r for r, _, _ in scheduler.records}
    assert (found[0].status, found[1].status) == ("failed", "ok") and "SIGKILL" in found[0].reason
    assert len(scheduler.executor.jobs) == 2 * MAX_ATTEMPTS and len(notes) == 2 and not scheduler.lost_runs


def test_a_run_that_another_program_does_is_put_off(tmp_path) -> None:
    first, second = requests(seeds=[0, 1])

    def fake_result(job: Job) -> JobResult | None:
        return JobResult(job, busy=True) if job.request == first and job.lock_timeout == 0 else None

    scheduler, _ = run_sweep(tmp_path, [first, second], fake_result=fake_result)
    assert [r.seed for r, _, _ in scheduler.records] == [1, 0]


def test_only_one_program_does_a_run(tmp_path) -> None:
    (request,) = requests()
    record = run.new_record(Plan(request))
    from filelock import FileLock

    with FileLock(tmp_path / "locks" / f"{record.id}-s0.lock"):
        with pytest.raises(run.Busy):
            run.run(request, tmp_path, lock_timeout=0)
        assert execute(Job(1, request, tmp_path)).busy
    assert run.run(request, tmp_path, lock_timeout=0)[2]


def test_what_a_crash_left_half_written_is_removed(tmp_path) -> None:
    (request,) = requests()
    record = run.new_record(Plan(request))
    target = store.path(tmp_path, record)
    half = target.with_name(f".{target.name}.123.tmp")
    half.parent.mkdir(parents=True)
    half.write_text("{")
    run.run(request, tmp_path)
    assert target.is_file() and not half.exists()


def test_what_another_seed_is_writing_stays(tmp_path) -> None:
    """Seed 1 is not seed 10."""
    (request,) = requests(seeds=[1])
    record = run.new_record(Plan(request))
    other = store.path(tmp_path, record).with_name(f".{record.id}-s10.json.123.tmp")
    other.parent.mkdir(parents=True)
    other.write_text("{")
    with run.run_lock(tmp_path, record, 0):
        assert other.exists()


def test_a_run_on_record_is_not_loaded(tmp_path, monkeypatch) -> None:
    (request,) = requests()
    run.run(request, tmp_path)
    monkeypatch.setattr(run.models, "load", None)
    assert run.run(request, tmp_path)[2] is False


# -- searching ------------------------------------------------------------------------------------------


def search(**keys) -> sweep_file.Search:
    return sweep_file.Search(
        **{"trials": 3, "rows": 8, "space": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}} | keys
    )


def test_a_search_scores_on_training_rows_that_it_does_not_train_on() -> None:
    rng = random.Random()
    count, seed = rng.randint(2, 60), rng.randrange(1000)
    task_group = task_files.task_group("sst2")
    plain = run_data.load(task_group, "embedded", None, True)
    held = Plan(Request("lora", "sst2", hold_out=(count, seed))).data
    text = lambda rows: overlap.texts(task_group.tasks[0], rows)  # noqa: E731
    scored, trained = text(held.eval_sets[0].rows.test), text(held.train_sets[0].rows)
    before, untouched = text(plain.train_sets[0].rows), text(plain.eval_sets[0].rows.test)
    assert len(scored) == count and not {*scored} & {*trained} and {*scored} <= {*before}
    assert not {*scored} & {*untouched} and {*scored} | {*trained} == {*before}
    same, other = (Plan(Request("lora", "sst2", hold_out=(count, s))).data for s in (seed, seed + 1))
    assert text(same.eval_sets[0].rows.test) == scored != text(other.eval_sets[0].rows.test)


def test_trials_and_runs_have_other_ids() -> None:
    facts = {"budget": {"trials": 3}, "used": {"seconds": 1.0}}
    plain = Request("lora", "sst2")
    ids = [Plan(r).identity() for r in (
        plain, replace(plain, hold_out=(8, 0)), replace(plain, hold_out=(8, 1)), replace(plain, tuning=facts),
        replace(plain, tuning=facts | {"used": {"seconds": 2.0}}),
    )]  # fmt: skip
    assert len({*ids}) == 4 and ids[3] == ids[4], "what was measured is no part of an id"
    assert Plan(plain).identity() == ids[0]


def test_too_many_rows_and_foreign_rows_cannot_be_held_out() -> None:
    with pytest.raises(UserError, match=r"at most half \(search.rows\)"):
        Plan(Request("lora", "sst2", hold_out=(1_000_000, 0)))
    data = run_data.load(task_files.task_group("sst2"), "embedded", None, True)
    data.eval_sets[0].rows.train = sources.load(task_files.get("stsb"), "embedded").train
    with pytest.raises(UserError, match="leave search out"):
        splits.split(data, hold_out=(4, 0))


@pytest.mark.long
def test_a_search_ends_in_runs_with_its_best_values(tmp_path) -> None:
    base, sampler = requests()[0], random.choice(["random", "tpe"])
    scheduler, _ = run_sweep(tmp_path, studies=[Study(search(sampler=sampler), base, [5])])
    finals = [r for r, _, _ in scheduler.records]
    assert [r.seed for r in finals] == [5] and not scheduler.lost_runs
    trials = [*store.read_all(tmp_path / "tuning")]
    assert len(trials) == 3 and all(t.data["held_out"]["rows"] == [8] and t.score.rows == 8 for t in trials)
    assert not (tmp_path / "tuning" / "adapters").exists() or not [*(tmp_path / "tuning/adapters").iterdir()]
    for r in finals:
        t = r.tuning
        assert t["budget"]["trials"] == t["used"]["trials"] == len(t["tried"]) == 3
        assert t["used"]["steps"] == 3 * t["budget"]["steps"] == 6
        assert t["used"]["seconds"] == pytest.approx(sum(x.train_seconds for x in trials), abs=1e-2)
        scores = {x.train_config["lr"]: (x.merged_score or x.score).value for x in trials}
        assert {e["values"]["lr"]: e["score"] for e in t["tried"]} == pytest.approx(scores)
        assert t["score"] == max(scores.values()) == scores[t["chosen"]["lr"]]
        assert r.train_config["lr"] == t["chosen"]["lr"] and "held_out" not in r.data
        assert all(1e-4 <= lr <= 1e-2 for lr in scores)
    assert {r.score.rows for r in finals} == {4}
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    again, _ = run_sweep(tmp_path, studies=[Study(search(sampler=sampler), base, [5])])
    assert [new for _, _, new in again.records] == [False], "a search that was done is done again"
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")} == before


def run_trials(study: Study, score) -> list[Request]:
    """Every trial of a study, which gets `score(request)` as its result; no trial is run."""
    found = []
    while (request := study.ask()) is not None:
        found.append(request)
        value = score(request)
        score_ = None if value is None else {"metric": "acc", "value": value, "rows": 8}
        status = "failed" if value is None else "ok"
        study.tell(make(train_seconds=1.5, status=status, reason="no luck", score=score_))
    return found


def test_every_method_has_the_same_budget() -> None:
    space = {
        "lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "set.r": [2, 4],
        "set.dora.targets": ["q,v", "all"],
    }
    bases = requests(methods="lora,dora")
    studies = [Study(search(trials=4, steps=7, space=space), b, [0]) for b in bases]
    trials = [run_trials(s, lambda r: r.train["lr"]) for s in studies]
    assert [len(t) for t in trials] == [4, 4] and {r.train["steps"] for t in trials for r in t} == {7}
    assert {*trials[0][0].options} == {"r"} and {*trials[1][0].options} == {"r", "targets"}
    assert {r.options["targets"] for r in trials[1]} <= {"q,v", "all"}
    final = studies[0].final_requests()[0]
    assert final.train["lr"] == max(r.train["lr"] for r in trials[0])
    assert final.train["steps"] == 2 and final.limit == 4 and final.hold_out is None


def test_seconds_end_a_search() -> None:
    study = Study(search(trials=50, seconds=4), requests()[0], [0])
    assert len(run_trials(study, lambda r: 0.5)) == 3  # of 1.5 s each: the third begins at 3 s


def test_a_search_finds_the_optimum() -> None:
    """TPE against a known function: nearer to its optimum than the same number of random draws."""

    def miss(sampler: str, seed: int) -> float:
        from math import log10

        study = Study(search(trials=30, sampler=sampler, seed=seed), requests()[0], [0])
        run_trials(study, lambda r: 1 - abs(log10(r.train["lr"] / 1e-3)))
        return abs(log10(study.final_requests()[0].train["lr"] / 1e-3))

    seed = random.randrange(1000)
    assert miss("tpe", seed) < 0.2, seed


def test_failed_trials_count_and_a_search_without_scores_is_reported(tmp_path) -> None:
    study = Study(search(), requests()[0], [0])
    assert len(run_trials(study, lambda r: None)) == 3 and study.final_requests() == []
    fake_result = lambda job: JobResult(job, failure="its worker died")  # noqa: E731
    scheduler, notes = run_sweep(
        tmp_path, studies=[Study(search(trials=1), requests()[0], [0])], fake_result=fake_result
    )
    assert scheduler.records == [] and "no trial of 1 gave a score" in scheduler.lost_runs[0] == notes[-1]


def test_without_a_space_the_rate_is_searched_around_the_methods_own() -> None:
    base = requests(methods="lora")[0]
    own = Plan(base).train_config.lr
    rates = [r.train["lr"] for r in run_trials(Study(search(space={}, trials=6), base, [0]), lambda r: 0.5)]
    assert all(own / 10 <= lr <= own * 10 for lr in rates) and len({*rates}) == 6
    untrained = Study(search(space={}), requests(methods="none")[0], [0, 1])
    assert untrained.ask() is None and len(untrained.final_requests()) == 2, "nothing to search: run as it is"


def test_a_sweep_with_a_search_plans_trials_and_runs(run_cli, tmp_path) -> None:
    plan = dry_run(run_cli, tmp_path, seeds=[0, 1], search={"trials": 5, "rows": 8})
    assert [(r["kind"], r["times"]) for r in plan["plan"]] == [("trial", 5), ("after the search", 2)]
    assert plan["total"]["runs"] == 7


def test_the_plan_of_a_search_says_what_is_on_record(run_cli, tmp_path) -> None:
    keys = {"search": {"trials": 2, "rows": 8, "steps": 2, "sampler": "random"}}
    wanted = sweep_file.read(write_sweep(tmp_path, **keys))
    study = Study(wanted.search, requests()[0], [0])
    run.run(study.ask(), tmp_path / "out" / "tuning")
    half = dry_run(run_cli, tmp_path, **keys)["plan"]
    assert [(r["kind"], r["times"], r["state"]) for r in half] == [
        ("trial", 1, "done"), ("trial", 1, "to do"), ("after the search", 1, "to do")
    ]  # fmt: skip
    run_sweep(tmp_path / "out", studies=[Study(wanted.search, requests()[0], [0])])
    whole = dry_run(run_cli, tmp_path, **keys)
    assert [(r["kind"], r["times"], r["state"]) for r in whole["plan"]] == [
        ("trial", 2, "done"), ("run", 1, "done")
    ]  # fmt: skip
    assert whole["total"]["to_do"] == 0 and whole["total"]["done"] == 3


# -- the command ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_runs_everything_in_workers(tmp_path, broken) -> None:
    import subprocess

    file = write_sweep(tmp_path, methods="lora,broken", seeds=[0, 1], set={"r": 2})
    line = [sys.executable, "-m", "peftzoo", "sweep", str(file), "--out", str(tmp_path / "out"), "--json",
            "--workers", "2", "--plugin", broken]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and sorted((r["method"], r["seed"], r["status"]) for r in found) == [
        ("broken", 0, "failed"), ("broken", 1, "failed"), ("lora", 0, "ok"), ("lora", 1, "ok")
    ], done.stderr  # fmt: skip
    lines = done.stderr.splitlines()
    assert lines[0].startswith("4 runs, 2 at once") and len([x for x in lines if x.startswith("[")]) == 4, (
        lines
    )
    assert str(tmp_path) not in json.dumps(found)
