"""What a run does around training: heads, scales, what it saves."""

from __future__ import annotations

import gc
import gzip
import json
import shlex
from pathlib import Path

import pytest
import torch

from peftzoo import cli, models
from peftzoo.adapters import read
from peftzoo.measuring import counters
from peftzoo.records.store import read as read_record
from peftzoo.runs import run as run_module
from peftzoo.runs.plan import Plan, Request
from peftzoo.runs.run import run


def test_regression_head_learns_standardised_targets_and_answers_in_task_units(tmp_path: Path) -> None:
    request = Request(method="lora", task="stsb", limit=24, train={"steps": 6})
    record, path, new = run(request, tmp_path)
    assert new and record.status == "ok", record.reason
    assert record.view == "head" and record.head_params > 0
    side = path.parent / record.examples["file"] if record.examples else None
    side = side or next(path.parent.glob("*.examples.jsonl.gz"))
    answers = [json.loads(line)["answer"] for line in gzip.decompress(side.read_bytes()).splitlines()]
    assert len(answers) == 24
    assert 1.0 < sum(answers) / len(answers) < 4.0  # a fresh head starts near the mean of 0..5, not near 0
    card, _ = read(tmp_path / "adapters" / f"{record.id}-s0")
    assert card["target"]["spread"] > 0 and 1.0 < card["target"]["mean"] < 4.0


@pytest.mark.parametrize("task", ["gsm8k", "sst2", "stsb"])
def test_untouched_model_trains_nothing(tmp_path: Path, task: str) -> None:
    record, _, _ = run(Request(method="none", task=task, limit=8, max_new_tokens=4), tmp_path)
    assert record.status == "ok", record.reason
    assert record.trainable_params == record.head_params == 0
    assert record.train_config["steps"] == 0 and record.final_loss is None


@pytest.mark.parametrize(("task", "questions"), [("winogrande", 0), ("bbh-fewshot-navigate", 6)])
def test_latency_is_that_of_the_first_rows_whole_prompt(tmp_path, monkeypatch, task, questions) -> None:
    """Not of what a task's template alone says: an option's number, or a question without its examples."""
    asked = []

    def spy(model, ids, **_):
        asked.append(ids[0].tolist())
        return {"prompt_tokens": float(ids.shape[1])}

    monkeypatch.setattr(counters, "generation_latency", spy)
    record, _, _ = run(Request(method="none", task=task, limit=2, max_new_tokens=2), tmp_path)
    assert record.status == "ok", record.reason
    text = models.load("embedded").tokenizer.decode(asked[0])
    assert text.count("Q:") == questions and len(asked[0]) > 5, text


def test_existing_record_is_not_made_again(tmp_path: Path) -> None:
    request = Request(method="lora", task="sst2", limit=8, train={"steps": 2})
    first, path, new = run(request, tmp_path)
    again, same, made = run(request, tmp_path)
    assert (new, made) == (True, False) and path == same and again.created == first.created
    _, _, forced = run(request, tmp_path, force=True)
    assert forced


def test_a_run_leaves_no_tensors_behind(tmp_path: Path) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(o, torch.nn.Parameter) for o in gc.get_objects())

    request = Request(method="lora", task="sst2", limit=4, train={"steps": 2})
    run(request, tmp_path)
    before = alive()
    run(request, tmp_path, force=True)
    assert alive() == before


@pytest.mark.parametrize("method", ["lora", "none"])
def test_the_recorded_command_names_the_same_run(method: str, tmp_path: Path, monkeypatch) -> None:
    request = Request(method=method, task="sst2", limit=4, train={"steps": 2, "lr": 2e-3}, seed=1)
    record, path, _ = run(request, tmp_path)
    monkeypatch.setattr("sys.argv", [*shlex.split(record.command), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert [p.name for p in tmp_path.rglob("*-s1.json")] == [path.name]
    assert read_record(path).created == record.created


def test_a_wait_for_another_program_is_told(tmp_path) -> None:
    """While another program holds the run's lock, its progress says so; then the run goes on."""
    import threading

    request = Request("none", "sst2", limit=2)
    record = run_module.new_record(Plan(request))
    stages: list[str] = []
    held, told = threading.Event(), threading.Event()

    def other() -> None:
        with run_module.run_lock(tmp_path, record, 0):
            held.set()
            told.wait(30)

    holder = threading.Thread(target=other)
    holder.start()
    held.wait(30)

    def on_progress(stage: str, *_: object) -> None:
        stages.append(stage)
        if stage == "wait":
            told.set()

    done, _, new = run_module.run(request, tmp_path, progress=on_progress)
    holder.join()
    assert new and done.status == "ok" and stages.index("wait") < stages.index("score")
    with run_module.run_lock(tmp_path, record, 0):
        again = run_module.run_lock(tmp_path, record, 0.1)
        with pytest.raises(run_module.Busy):
            again.__enter__()
    with run_module.run_lock(tmp_path, record, 0):  # free again
        pass
