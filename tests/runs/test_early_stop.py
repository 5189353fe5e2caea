"""Training rows that a run keeps out, and the state with the lowest loss on them."""

from __future__ import annotations

import json
import math
import random
import shlex
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from peftzoo import models
from peftzoo.adapters import attach
from peftzoo.cli import _run_tables
from peftzoo.errors import UserError
from peftzoo.records import store
from peftzoo.records.schema import Record
from peftzoo.runs import estimates, packs, runner, verification
from peftzoo.runs.plan import LookupCache, Plan, Request, resolve
from peftzoo.runs.run import run
from peftzoo.scoring import evaluation
from peftzoo.sweeps import sweep_file
from peftzoo.tasks import overlap, run_data, sources, splits, task_files
from peftzoo.training import batches, selection
from tests.boards.test_tables import make
from tests.cli.test_cli import one_document
from tests.runs.test_accelerate import LAUNCH, bench
from tests.tasks.test_run_data import FakeAttached

TRAIN = {"steps": 6, "batch_size": 4, "lr": 5e-3, "schedule": "constant_with_warmup", "warmup": 0.0}
STOPPING = Request(
    "lora", "sst2", seed=1, train=TRAIN, limit=4, precision="fp32", validation=12, early_stop=6
)
"""Its held-out loss is lowest after step 4, and higher after step 6."""
CACHE = LookupCache()


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("early")


@pytest.fixture(scope="module")
def recorded(out):
    """A run of six checks that does not stop before its end."""
    record, _, _ = run(STOPPING, out)
    assert record.status == "ok", record.reason
    return record


def texts(train_set: run_data.TrainSet) -> list[str]:
    return overlap.texts(train_set.task, train_set.rows)


def adapter_of(out: Path, record) -> dict[str, torch.Tensor]:
    (file,) = (out / "adapters" / f"{record.id}-s{record.seed}").glob("*.safetensors")
    return load_file(file)


# -- rows -----------------------------------------------------------------------------------------------


def test_the_same_rows_leave_the_training_set_for_every_method_and_seed() -> None:
    count = random.randint(2, 40)
    plain = Plan(Request("lora", "sst2"), CACHE).data
    plans = [Plan(Request(m, "sst2", seed=s, validation=count)) for m, s in (("lora", 0), ("vera", 7))]
    held = [texts(p.data.validation_sets[0]) for p in plans]
    trained = [texts(p.data.train_sets[0]) for p in plans]
    scored = overlap.texts(plain.eval_sets[0].task, plain.eval_sets[0].rows.test)
    assert held[0] == held[1] and len(held[0]) == count and trained[0] == trained[1]
    assert not {*held[0]} & ({*trained[0]} | {*scored})
    assert sorted(held[0] + trained[0]) == sorted(texts(plain.train_sets[0])), "a row was lost"
    for p in plans:
        assert p.data.info["validation"] == {"rows": [count], "seed": 0}
        assert p.data.eval_sets[0].rows.test["sentence"] == plain.eval_sets[0].rows.test["sentence"]
    assert "validation" not in plain.info and not plain.validation_sets


def test_each_data_set_of_a_mixture_gives_rows() -> None:
    plan = Plan(Request("lora", "commonsense", source="embedded", validation=5), CACHE)
    before = Plan(Request("lora", "commonsense", source="embedded"), CACHE).data.train_sets
    held, rest = plan.data.validation_sets, plan.data.train_sets
    assert len(held) == len(rest) == len(before) > 1 and plan.data.info["validation"]["rows"] == [5] * len(
        held
    )
    trained = {text for t in rest for text in texts(t)}
    for own in held:
        assert len(own.rows) == 5 and not {*texts(own)} & trained


def small_data(sentences: list[str], scored: list[str], more: list[str] = ()) -> run_data.RunData:
    """Data of one task with these rows; `more` are the rows of a second train set."""
    rows_of = lambda some: datasets.Dataset.from_list([{"sentence": s, "label": 0} for s in some])  # noqa: E731
    task = task_files.get("sst2")
    train_sets = [run_data.TrainSet(task, rows_of(s)) for s in (sentences, more) if s]
    rows = sources.Rows(train_sets[0].rows, rows_of(scored))
    return run_data.RunData([run_data.EvalSet(task, rows)], train_sets)


def test_rows_of_equal_text_go_together_and_scored_texts_are_not_drawn() -> None:
    """Also of equal text in another train set."""
    sentences = ["a", "A.", "b", "c", "d", "d", "e", "f"]
    data = splits.with_validation(small_data(sentences, ["c", "F!"], [*"abdexyzw"]), 3)
    held = [text for v in data.validation_sets for text in texts(v)]
    trained = {text for t in data.train_sets for text in texts(t)}
    assert len(held) == 6 and not {*held} & (trained | {"c", "f"}) and {"c", "f"} <= trained
    with pytest.raises(UserError, match=r'"sst2": --hold-out 3: at most 2, half of the different rows'):
        splits.with_validation(small_data(["a", "a", "b", "c", "d"], ["x"]), 3)
    with pytest.raises(UserError, match="too few different training rows to hold some out"):
        splits.with_validation(small_data(["a", "a"], ["x"]), None)
    with pytest.raises(UserError, match="too few different training rows"):
        splits.with_validation(small_data(["a", "b", "c"], ["a", "b", "c"]), 1)


def test_without_a_number_a_thousand_rows_or_half_of_them() -> None:
    few = splits.with_validation(small_data([str(i) for i in range(9)], ["x"]))
    assert few.info["validation"]["rows"] == [4] and few.trained_rows == 5
    assert Plan(Request("lora", "sst2", early_stop=1), CACHE).validation_rows == 1000


def test_epochs_are_passes_over_the_rows_that_are_left() -> None:
    request = Request("lora", "sst2", train={"epochs": 1, "batch_size": 10}, validation=400)
    left = Plan(replace(request, validation=None), CACHE).data.trained_rows - 400
    assert Plan(request, CACHE).train_config.steps == left // 10


# -- what is refused ------------------------------------------------------------------------------------

REFUSED = [
    ({"validation": 0}, "--hold-out 0: at least 1"),
    ({"validation": -3, "early_stop": 1}, "--hold-out -3: at least 1"),
    ({"validation": 1_000_000}, "--hold-out 1000000: at most 1"),
    ({"early_stop": 0}, "--early-stop 0: from 1 to 20"),
    ({"early_stop": 21}, "--early-stop 21: from 1 to 20"),
    ({"early_stop": 2, "protocol": "best-epoch"}, "--early-stop 2 and --protocol best-epoch"),
    ({"validation": 8, "protocol": "clean"}, "--hold-out 8 and --protocol clean"),
    ({"early_stop": 2, "method": "none"}, 'method "none" does not train: leave --early-stop 2 out'),
    ({"validation": 8, "method": "lorahub", "task": "gsm8k"}, '"lorahub" fits itself without gradients'),
    ({"validation": 8, "hold_out": (4, 0)}, "a trial of a search holds rows of its own out"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        Plan(Request(**{"method": "lora", "task": "sst2"} | changes), CACHE)


def test_methods_that_do_not_train_are_left_out_of_all() -> None:
    requests = [Request(m, "sst2", early_stop=3) for m in ("none", "lora")]
    plans, notes = resolve(requests, skip=True)
    assert [p.request.method for p in plans] == ["lora"]
    assert len(notes) == 1 and 'method "none" does not train' in notes[0]


# -- when it stops --------------------------------------------------------------------------------------


def reference(losses: list[float | None], patience: int) -> tuple[int, int]:
    """(check whose state is best, check after which training stops), each from 1, said plainly."""
    best, lowest, waited = 1, math.inf, 0
    for check, loss in enumerate(losses, 1):
        if loss is not None and loss < lowest:
            best, lowest, waited = check, loss, 0
        elif check > 1:
            waited += 1
        if waited == patience:
            return best, check
    return best, len(losses)


def test_it_stops_when_the_loss_has_not_become_lower(tmp_path) -> None:
    """Planted losses, equal ones and ones that are not finite among them, also after an interruption."""
    for number in range(60):
        patience, file = random.randint(1, 4), tmp_path / f"{number}.safetensors"
        losses = [random.choice([None, 1.0, 2.0, 3.0, 4.0, 5.0]) for _ in range(12)]
        fake = FakeAttached()
        options = {"higher_is_better": False, "patience": patience}
        measured: list[int] = []

        def loss(fake=fake, losses=losses, measured=measured) -> float | None:
            measured.append(int(fake.tensor[0]))
            return losses[measured[-1] - 1]

        restart_at, stopped, step, again = random.randint(1, 12), None, 0, False
        best = selection.BestCheckpoint(file, fake, loss, **options)
        while stopped is None and step < 12:
            step += 1
            if step == restart_at and not again:  # the run goes on from an earlier step
                again, step = True, random.randint(1, step)
                best = selection.BestCheckpoint(file, fake, loss, **options)
            fake.tensor.fill_(step)
            stopped = step if best(step) else None
        best_check, last_check = reference(losses, patience)
        assert (best.chosen, stopped or 12) == (best_check, last_check), (losses, patience)
        assert measured == list(range(1, last_check + 1)), "a state was measured twice"
        best.restore()
        assert fake.tensor.tolist() == [best_check] * 2
        best = selection.BestCheckpoint(file, fake, loss, **options)  # interrupted while it was scored
        ends = [step for step in range(random.randint(1, last_check), 13) if best(step)]
        assert ends[:1] == ([stopped] if stopped else []), "it stops elsewhere when it goes on"


def test_a_lost_best_state_is_not_passed_over(tmp_path) -> None:
    best = selection.BestCheckpoint(tmp_path / "best.safetensors", FakeAttached(), lambda: 1.0)
    best(1)
    (tmp_path / "best.safetensors").write_bytes(b"x")
    with pytest.raises(RuntimeError, match="step 1 cannot be read"):
        best.restore()


@pytest.mark.parametrize("steps", [0, 1, 7, 20, 21, 150, 1000])
def test_checks_are_at_equal_distances(steps: int) -> None:
    checks = selection.check_steps(steps)
    assert len(checks) == min(steps, 20) and checks[-1:] == ([steps] if steps else [])
    gaps = [b - a for a, b in zip([0, *checks], checks, strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_run_that_stops_reports_its_best_state_and_its_own_steps(tmp_path, monkeypatch) -> None:
    losses = iter([4.0, 3.0, 2.0, 2.0, 2.5, 1.0, 9.0])  # the first one before training, the last one after
    monkeypatch.setattr(runner.Runner, "loss_on", lambda self, examples: next(losses))
    record, _, _ = run(replace(STOPPING, early_stop=2), tmp_path)
    assert record.status == "ok", record.reason
    assert record.chosen == {"by": "held-out loss", "step": 2, "stopped": 4,
                             "scores": {"1": 3.0, "2": 2.0, "3": 2.0, "4": 2.5}}  # fmt: skip
    assert record.train_config["steps"] == 6 and len(record.loss_curve) == 4 and record.trained_steps == 4
    assert record.validation == {"rows": 12, "early_stop": 2, "start_loss": 4.0, "loss": 1.0}
    assert not [*(tmp_path / "checkpoints").glob("*.safetensors")]
    per_step = record.train_seconds / 4
    plan = make(train={**record.train_config, "steps": 100}, data=record.data, score=None)
    past = record.model_copy(update={"score": None, "merged_score": None})
    assert estimates._seconds(past, plan) == pytest.approx(100 * per_step)


# -- the reported state ---------------------------------------------------------------------------------


def independent_losses(plan: Plan) -> tuple[list[float], list[dict[str, torch.Tensor]], float]:
    """Held-out loss and adapter after each step, and the loss before: rows one by one, AdamW, no padding."""
    loaded, data, config = models.load("embedded"), plan.data, plan.train_config
    handle = attach(loaded.model, plan.new_adapter(), seed=plan.request.seed)

    def row_tokens(train_set) -> list[tuple[list[int], int]]:
        task = evaluation.harness_task(train_set.task, sources.Rows(None, train_set.rows))
        pairs = [evaluation.prompt_and_answer(task, row) for row in train_set.rows]
        ids = [[*loaded.tokenizer.encode(p + a), loaded.tokenizer.eos_token_id] for p, a in pairs]
        return [(i, len(loaded.tokenizer.encode(p.rstrip()))) for i, (p, _) in zip(ids, pairs, strict=True)]

    def loss_of(rows) -> torch.Tensor:
        total, count = torch.zeros(()), 0
        for ids, prompt in rows:
            logits = loaded.model(torch.tensor([ids])).logits[0]
            total = total + F.cross_entropy(
                logits[prompt - 1 : -1], torch.tensor(ids[prompt:]), reduction="sum"
            )
            count += len(ids) - prompt
        return total / count

    train, held = row_tokens(data.train_sets[0]), row_tokens(data.validation_sets[0])
    lengths = [len(ids) for ids, _ in train]
    order = batches.batch_order(lengths, config.steps, config.batch_size, plan.request.seed)
    parameters = handle.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    measured, states = [], []
    with torch.no_grad():
        start = float(loss_of(held))
    for rows in order:
        loss_of([train[i] for i in rows]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            measured.append(float(loss_of(held)))
        states.append({k: v.clone() for k, v in handle.state_dict().items()})
    return measured, states, start


def test_the_reported_state_is_the_one_with_the_lowest_loss(recorded, out) -> None:
    measured, states, start = independent_losses(Plan(STOPPING, CACHE))
    assert recorded.validation["start_loss"] == pytest.approx(start, rel=1e-4)
    scores = recorded.chosen["scores"]
    assert [*map(int, scores)] == [1, 2, 3, 4, 5, 6] == [*range(1, recorded.chosen["stopped"] + 1)]
    assert [*scores.values()] == pytest.approx(measured, rel=2e-3)
    lowest = measured.index(min(measured))
    assert lowest < 5, "the last state is the best: this run shows nothing"
    assert recorded.chosen["step"] == lowest + 1 and recorded.chosen["by"] == "held-out loss"
    assert recorded.validation["loss"] == min(scores.values())
    saved = adapter_of(out, recorded)
    assert saved.keys() == states[lowest].keys()
    distance = [max(float((s[k] - v).abs().max()) for k, v in saved.items()) for s in states]
    assert distance.index(min(distance)) == lowest and min(distance) < 1e-3 < sorted(distance)[1], distance


def test_held_out_rows_alone_choose_nothing(tmp_path, recorded) -> None:
    """The last state is reported, with its loss; the checks of an early stop do not change the training."""
    record, _, _ = run(replace(STOPPING, early_stop=None), tmp_path)
    assert record.status == "ok" and record.chosen is None and record.id != recorded.id
    assert record.validation == {"rows": 12, "start_loss": recorded.validation["start_loss"],
                                 "loss": recorded.chosen["scores"]["6"]}  # fmt: skip
    assert record.loss_curve == recorded.loss_curve and "--hold-out 12" in record.command


def test_a_head_chooses_by_the_loss_of_a_row(tmp_path) -> None:
    request = Request(
        "lora", "stsb", validation=6, early_stop=1, limit=4, train={"steps": 3, "batch_size": 4}
    )
    record, _, _ = run(request, tmp_path)
    assert record.status == "ok" and record.view == "head", record.reason
    assert record.validation["loss"] == min(record.chosen["scores"].values())
    assert record.validation["rows"] == 6 and record.validation["start_loss"] > 0


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, recorded, out) -> None:
    at = random.randint(2, 6)
    on_step = runner.Runner.on_step

    def interrupt(self, step: int, *more) -> None:
        if step == at:
            raise KeyboardInterrupt
        on_step(self, step, *more)

    monkeypatch.setattr(runner.Runner, "on_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(replace(STOPPING, save_every=2), tmp_path)
    monkeypatch.undo()
    record, _, _ = run(replace(STOPPING, save_every=2), tmp_path)
    assert record.status == "ok" and record.resumed_at == (at - 1) // 2 * 2
    for name in ("id", "chosen", "validation", "loss_curve", "final_loss"):
        assert getattr(record, name) == getattr(recorded, name), name
    assert record.result.value == recorded.result.value
    whole, resumed = adapter_of(out, recorded), adapter_of(tmp_path, record)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


# -- ids, records, commands -----------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["gsm8k", "gsm8k-peft-board"])
def test_ids_of_plain_runs_are_those_on_record(task: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = store.published_folder() / "records" / "gsm8k" / task / "embedded" / "lora"
    files = sorted(folder.glob("*.json"))
    assert files
    for record in map(store.read, files):
        request = verification.request_of(record)
        assert request.validation is request.early_stop is None
        assert Plan(request, CACHE).identity() == record.id


def test_ids_tell_rows_and_early_stops_apart() -> None:
    plain = Request("lora", "sst2")
    changes = [{}, {"validation": 8}, {"validation": 9}, {"validation": 8, "early_stop": 3},
               {"validation": 8, "early_stop": 4}, {"early_stop": 3}]  # fmt: skip
    ids = [Plan(replace(plain, **c), CACHE).identity() for c in changes]
    assert len({*ids}) == len(ids)
    assert Plan(replace(plain, validation=1000, early_stop=3), CACHE).identity() == ids[-1]


def test_the_record_says_how_to_repeat_the_run(recorded, out, run_cli) -> None:
    asked = verification.request_of(recorded)
    assert (asked.validation, asked.early_stop) == (12, 6) and Plan(asked, CACHE).identity() == recorded.id
    assert "--hold-out 12 --early-stop 6" in recorded.command
    assert store.read(recorded.file) == recorded
    line = shlex.join(shlex.split(recorded.command)[1:])
    code, shown, err = run_cli(f"{line} --out {out} --json")
    assert code == 0, err
    (document,) = one_document(shown)
    assert document["created"] == recorded.created, "another run"
    assert document["chosen"] == recorded.chosen and document["validation"] == recorded.validation


def test_older_records_have_no_such_field() -> None:
    raw = json.loads(make().model_dump_json())
    del raw["validation"]
    assert Record(**raw).validation is None


def test_such_runs_are_done_alone(tmp_path) -> None:
    train = {"steps": 1, "batch_size": 2}
    requests = [Request("lora", "sst2", seed=s, validation=4, limit=2, train=train) for s in (0, 1)]
    results = packs.run_packs(requests, tmp_path, size=2)
    assert [(r.status, r.packed, r.validation["rows"]) for r, _, _ in results] == [("ok", None, 4)] * 2


def test_the_keys_of_a_sweep_file(tmp_path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("{methods: lora, tasks: sst2, hold_out: 9, early_stop: 4}")
    (request,) = sweep_file.read(file).requests()
    assert (request.validation, request.early_stop) == (9, 4)
    file.write_text("{methods: lora, tasks: sst2, hold_out: 0}")
    with pytest.raises(UserError, match=r"hold_out.*greater than or equal to 1"):
        sweep_file.read(file)
    file.write_text("{methods: lora, tasks: sst2, early_stop: 4, search: {lr_grid: 3}}")
    with pytest.raises(UserError, match="early_stop and search: a search holds rows of its own out"):
        sweep_file.read(file)


@pytest.mark.parametrize(("words", "message"), [
    (f"--early-stop {selection.CHECKS + 1}", f"less than or equal to {selection.CHECKS};"),
    ("--early-stop 0", "greater than or equal to 1"), ("--hold-out 0", "greater than or equal to 1"),
    ("--early-stop 2 --protocol clean", "the protocol chooses the reported state by scores"),
])  # fmt: skip
def test_a_mistake_is_told_in_one_line(words: str, message: str, run_cli, tmp_path) -> None:
    code, shown, err = run_cli(f"bench --method lora --task sst2 {words} --out {tmp_path}")
    assert code == 2 and shown == "" and err.strip().count("\n") == 0
    assert words.split()[0] in err and message in err


# -- what is printed ------------------------------------------------------------------------------------


def test_the_table_shows_where_it_stopped_and_what_broke_down(capsys) -> None:
    chosen = {"by": "held-out loss", "step": 40, "stopped": 60, "scores": {"40": 0.5}}
    good = make("lora", validation={"rows": 9, "start_loss": 2.0, "loss": 0.5}, chosen=chosen)
    broken = make("lora", 1, validation={"rows": 9, "start_loss": 2.0, "loss": 2.25})
    infinite = make("lora", 2, validation={"rows": 9, "start_loss": 2.0, "loss": None})
    records = [good, broken, infinite]
    _run_tables.print_results([(r, Path("x.json"), True) for r in records], False, {})
    shown = capsys.readouterr().out
    heading, first = shown.splitlines()[1:3]
    assert "held out" in heading and "stopped" in heading and "0.500" in first and "60 / 40" in first
    lines = [line for line in shown.splitlines() if line.startswith("ok: ")]
    assert lines[0] == "ok: x.json"
    assert lines[1].endswith("(breakdown: held-out loss 2.250, began at 2.000; try a lower --lr)")
    assert "held-out loss not finite" in lines[2]
    assert _run_tables.score_or_reason(broken) == f"acc 0.500; {_run_tables.breakdown(broken)}"
    plain = make("lora", validation=None)
    _run_tables.print_results([(plain, Path("x.json"), True)], False, {})
    assert "held out" not in capsys.readouterr().out and _run_tables.breakdown(plain) == ""


@pytest.mark.long
def test_two_processes_stop_together(tmp_path) -> None:
    """At a learning rate at which the loss rises again, so that both have to stop before the end."""
    words = "--method lora --seeds 1 --hold-out 12 --early-stop 1 --lr 0.005 --steps 8 --warmup 0"
    words = [*words.split(), "--schedule", "constant_with_warmup"]
    (one,), _ = bench([], tmp_path / "one", *words)
    (two,), _ = bench(LAUNCH, tmp_path / "two", *words)
    assert one["chosen"]["stopped"] < 8 and one["id"] == two["id"]
    assert [two["chosen"][k] for k in ("step", "stopped")] == [one["chosen"][k] for k in ("step", "stopped")]
    assert two["validation"]["loss"] == pytest.approx(one["validation"]["loss"], rel=1e-3)
