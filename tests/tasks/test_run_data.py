"""Task groups, protocols that select a checkpoint, overlap of training and scored rows, retention."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from peftzoo.errors import UserError
from peftzoo.records import store
from peftzoo.records.schema import Score, mean
from peftzoo.runs.plan import Plan, Request
from peftzoo.runs.run import run
from peftzoo.tasks import overlap, run_data, sources, splits, task_files
from peftzoo.tasks.schema import Protocol
from peftzoo.training import selection

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
TRAINED_TOGETHER = [name for name in task_files.groups() if task_files.expand([name]) == [name]]


def outcomes(path: Path) -> list[dict]:
    import gzip

    lines = gzip.decompress(path.with_suffix(".examples.jsonl.gz").read_bytes()).decode().splitlines()
    return [json.loads(line) for line in lines]


# -- groups trained together ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED_TOGETHER)
def test_a_group_trains_on_the_rows_of_all_its_tasks(name: str) -> None:
    plan = Plan(Request("lora", name))
    row_counts = {}
    for task in plan.task_group.tasks:
        rows = sources.load(task, "embedded")
        if rows.train:
            row_counts[task.dataset_path, task.dataset_name, task.doc_to_text] = len(rows.train)
    assert plan.data.trained_rows == sum(row_counts.values())
    assert [p.name for p in plan.eval_sets] == list(task_files.groups()[name])
    assert sum(plan.data.info["trained_on"].values()) == plan.data.trained_rows


def test_one_model_is_scored_on_each_task_of_a_group(tmp_path) -> None:
    request = Request("lora", "mnli", train={"steps": 3}, limit=12)
    record, path, _ = run(request, tmp_path)
    assert record.status == "ok", record.reason
    members = task_files.groups()["mnli"]
    score, member_scores = record.result, [record.result.others[f"{m}/acc"] for m in members]
    assert score.metric == "mean" and score.value == pytest.approx(sum(member_scores) / 2)
    assert score.rows == record.data["scored_rows"] == 24 and store.read(path) == record
    assert {o["task"] for o in outcomes(path)} == set(members)
    for member, value in zip(members, member_scores, strict=True):
        hits = [o["acc"] for o in outcomes(path) if o["task"] == member]
        assert len(hits) == 12 and sum(hits) / 12 == pytest.approx(value)


def test_a_mean_of_scores_by_hand() -> None:
    one = Score(metric="acc", value=0.5, stderr=0.3, rows=10, unparsed=0.1, others={"f1": 0.2}, seconds=1)
    two = Score(metric="mcc", value=0.1, stderr=0.4, rows=30, unparsed=0.3, seconds=2)
    both = mean({"a": one, "b": two})
    assert both.value == pytest.approx(0.3) and both.stderr == pytest.approx(0.25) and both.rows == 40
    assert both.unparsed == pytest.approx(0.25) and both.seconds == 3
    assert both.others == {"a/acc": 0.5, "b/mcc": 0.1, "a/f1": 0.2}
    undefined = mean({"a": one, "b": two.model_copy(update={"value": None, "stderr": None})})
    assert undefined.value is None and undefined.stderr is None


@pytest.mark.skipif(not REAL.is_dir(), reason="no mirror of the real data sets beside this checkout")
def test_a_task_without_rows_is_left_out_and_the_record_says_so() -> None:
    data = run_data.load(task_files.task_group("mnli"), "mirror", REAL, trains=True)
    assert [p.name for p in data.eval_sets] == ["mnli_matched"]
    assert "mirror lacks" in data.info["left_out"]["mnli_mismatched"]
    assert data.info["files"]["mnli_matched/validation_matched"]["stand_in"] == "train_heldout"


@pytest.mark.skipif(not REAL.is_dir(), reason="no mirror of the real data sets beside this checkout")
def test_the_mix_is_of_the_training_rows_that_there_are() -> None:
    data = run_data.load(task_files.task_group("commonsense"), "mirror", REAL, trains=True)
    assert len(data.eval_sets) == 8
    rows = data.info["trained_on"]
    assert set(rows) == {f"commonsense-{n}" for n in ("boolq", "arc_easy", "arc_challenge", "openbookqa")}
    assert sum(rows.values()) == data.trained_rows


def test_a_mixed_train_set_goes_before_the_members_own_rows(tmp_path) -> None:
    task_group = task_files.task_group("commonsense")
    columns = {"input": "", "output": "x", "answer": "true"}
    lines = [json.dumps({"instruction": f"is {i} even ?", **columns}) + "\n" for i in range(9)]
    (choice,) = task_group.about.train
    for path, split in ((choice.dataset_path, choice.split), ("llm_adapters/commonsense", "test")):
        name = choice.dataset_name or "default" if split == choice.split else "boolq"
        place = tmp_path / path.replace("/", "__") / name
        place.mkdir(parents=True)
        (place / f"{split}.jsonl").write_text("".join(lines[:7] if split == choice.split else lines[7:]))
    data = run_data.load(task_group, "mirror", tmp_path, trains=True)
    assert data.trained_rows == 7 and data.info["trained_on"]["id"] == choice.dataset_path
    assert [p.name for p in data.eval_sets] == ["commonsense-boolq"] and len(data.info["left_out"]) == 7


def test_tasks_that_are_scored_in_different_ways_cannot_go_together(monkeypatch) -> None:
    task_group = task_files.task_group("mnli")
    mixed = task_group.__class__(
        "mixed", 1.0, task_group.about, (task_files.get("sst2"), task_files.get("gsm8k"))
    )
    monkeypatch.setattr(task_files, "task_group", lambda name: mixed)
    with pytest.raises(UserError, match=r'"sst2" and "gsm8k" are scored in different ways'):
        Plan(Request("lora", "mixed"))


def test_a_task_that_is_only_scored_needs_no_training_rows(tmp_path) -> None:
    with pytest.raises(UserError, match=r'"svamp" has no training rows .* --method none'):
        Plan(Request("lora", "svamp"))
    record, _, _ = run(Request("none", "svamp", limit=4, max_new_tokens=4), tmp_path)
    assert record.status == "ok" and record.result.rows == 4


# -- protocols ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "rows", "batch_size", "expected"),
    [(100, 1000, 10, [20, 40, 60, 80, 100]), (80, 100, 10, list(range(10, 81, 10))), (3, 100, 1, [1, 2, 3]),
     (7, 10, 10, list(range(1, 8))), (0, 10, 1, [])],
)  # fmt: skip
def test_evaluations_are_at_the_ends_of_epochs_and_at_least_five(steps, rows, batch_size, expected) -> None:
    assert selection.eval_steps(steps, rows, batch_size) == expected


class FakeAttached:
    """An attached adapter with one tensor."""

    edits_base = False
    sites = ()

    def __init__(self) -> None:
        self.tensor = torch.zeros(2)
        self.adapter = self

    def state_dict(self) -> dict:
        return {"x": self.tensor}

    def named_buffers(self) -> tuple:
        return ()


@pytest.mark.parametrize("scores", [[0.1, 0.5, 0.3], [0.2, 0.2, 0.1], [None, None, 0.0], [None, None, None]])
def test_the_best_checkpoint_is_restored_even_after_a_restart(tmp_path, scores) -> None:
    fake, scored_steps = FakeAttached(), []

    def score() -> float | None:
        scored_steps.append(int(fake.tensor[0]))
        return scores[scored_steps[-1] - 1]

    def evaluate(best: selection.BestCheckpoint, steps: list[int]) -> selection.BestCheckpoint:
        for step in steps:
            fake.tensor.fill_(step)
            best(step)
        return best

    path = tmp_path / "best.safetensors"
    evaluate(selection.BestCheckpoint(path, fake, score), [1, 2])
    best = evaluate(selection.BestCheckpoint(path, fake, score), [2, 3])
    assert scored_steps == [1, 2, 3], "a checkpoint was scored twice"
    fake.tensor.fill_(9)
    best.restore()
    known = [s for s in scores if s is not None]
    best_step = scores.index(max(known)) + 1 if known else 1
    assert best.chosen == best_step and fake.tensor.tolist() == [best_step] * 2
    assert best.scores == dict(enumerate(scores, 1))


def test_best_epoch_reports_the_best_checkpoint(tmp_path) -> None:
    request = Request("lora", "sst2", protocol="best-epoch", train={"steps": 10, "batch_size": 4}, limit=40)
    record, _, _ = run(request, tmp_path)
    assert record.status == "ok", record.reason
    assert record.protocol == "best-epoch" and "--protocol best-epoch" in record.command
    step_scores = record.chosen["scores"]
    assert sorted(map(int, step_scores)) == [2, 4, 6, 8, 10]
    assert max(step_scores.values()) == step_scores[str(record.chosen["step"])]
    assert record.result.value == pytest.approx(
        max(step_scores.values()), abs=0.026
    )  # one row of forty: rounding
    assert not [*(tmp_path / "checkpoints").glob("*")]
    plain, _, _ = run(Request("lora", "sst2", train={"steps": 10, "batch_size": 4}, limit=40), tmp_path)
    assert plain.id != record.id and plain.chosen is None and plain.protocol == "last-step"


def test_evaluating_checkpoints_does_not_change_the_training(tmp_path) -> None:
    common = {"train": {"steps": 6, "batch_size": 4}, "limit": 8, "options": {"dropout": 0.2}}
    a, _, _ = run(Request("lora", "sst2", **common), tmp_path)
    b, _, _ = run(Request("lora", "sst2", protocol="best-epoch", **common), tmp_path)
    assert a.final_loss == b.final_loss


def test_clean_chooses_on_some_rows_and_reports_others() -> None:
    plans = {seed: Plan(Request("lora", "sst2", protocol="clean", seed=seed)) for seed in (0, 1)}
    rows = sources.load(task_files.get("sst2"), "embedded").test
    for p in plans.values():
        (eval_set,) = p.eval_sets
        chosen, reported = (
            {r["sentence"] for r in split} for split in (eval_set.selection_rows, eval_set.rows.test)
        )
        assert not chosen & reported and len(chosen) + len(reported) == len(rows)
        assert abs(len(chosen) - len(reported)) <= 1
    assert plans[0].eval_sets[0].selection_rows["idx"] != plans[1].eval_sets[0].selection_rows["idx"]
    assert plans[0].identity() == plans[1].identity()


@pytest.mark.parametrize(("choice", "left"), [(100, 200), (0.25, 225)])
def test_a_number_or_a_share_of_rows_chooses(choice, left: int) -> None:
    data = run_data.load(task_files.task_group("sst2"), "embedded", None, trains=False)
    parts = splits.split(data, selection=Protocol(choose=choice), seed=3)
    assert len(parts.eval_sets[0].rows.test) == left and len(parts.eval_sets[0].selection_rows) == 300 - left
    assert len(data.eval_sets[0].rows.test) == 300 and data.eval_sets[0].selection_rows is None
    with pytest.raises(UserError, match=rf"300 of {left} scored rows"):
        splits.split(parts, selection=Protocol(choose=300), seed=3)


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UserError, match=r'unknown protocol "best": did you mean "best-epoch"'):
        Plan(Request("lora", "sst2", protocol="best"))
    with pytest.raises(UserError, match=r'unknown protocol "clean".*peftzoo show gsm8k'):
        Plan(Request("lora", "gsm8k", protocol="clean"))


# -- overlap --------------------------------------------------------------------------------------------


def test_texts_are_compared_without_case_and_marks() -> None:
    import datasets

    task = task_files.get("sst2")
    rows = datasets.Dataset.from_list([{"sentence": s, "label": 0} for s in ("A dog, it IS.", "( a ) + 1")])
    assert overlap.texts(task, rows) == ["a dog it is", "( a ) + 1"]
    assert overlap.overlapping_indices(["x", "y", "z"], [["y"], ["q", "z"]]) == [1, 2]


def contaminated_mirror(folder: Path, count: int) -> int:
    """Write a mirror of sst2 in which `count` scored rows are training rows too; the index of the first."""
    rng, rows = random.Random(), sources.load(task_files.get("sst2"), "embedded")
    train, test = rows.train.to_list()[:40], rows.test.to_list()[:20]
    numbers = sorted(rng.sample(range(20), count))
    for n in numbers:
        train[rng.randrange(40)] = {**test[n], "sentence": test[n]["sentence"].upper() + " !"}
    place = folder / "nyu-mll__glue" / "sst2"
    place.mkdir(parents=True)
    for name, lines in (("train", train), ("validation", test)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return numbers[0]


def test_a_scored_row_that_is_trained_on_is_refused(tmp_path) -> None:
    first = contaminated_mirror(tmp_path, 1)
    with pytest.raises(UserError, match=rf"text of 1 of 20 scored rows \(first: row {first}\) is among"):
        Plan(Request("lora", "sst2", source="mirror", data=str(tmp_path)))


def test_a_task_may_allow_for_it_and_the_record_says_how_many(tmp_path) -> None:
    contaminated_mirror(tmp_path, 1)
    file = tmp_path / "sst2-again.yaml"
    raw = yaml.safe_load((task_files.folder() / "glue" / "sst2.yaml").read_text())
    raw["include"] = str(task_files.folder() / "glue" / raw["include"])
    raw["task"], raw["metadata"]["peftzoo"]["overlap"] = "sst2-again", "record"
    file.write_text(yaml.safe_dump(raw))
    plan = Plan(Request("lora", str(file), source="mirror", data=str(tmp_path)))
    assert plan.data.info["overlap"] == {"sst2-again": {"rows": 1, "of": 20}}


# -- retention ------------------------------------------------------------------------------------------


def test_retention_is_the_loss_on_another_tasks_text(tmp_path) -> None:
    from peftzoo import models
    from peftzoo.scoring import evaluation
    from peftzoo.training import batches

    record, _, _ = run(Request("lora", "sst2", train={"steps": 12}, limit=8, retention="stsb"), tmp_path)
    assert record.status == "ok", record.reason
    retention = record.retention
    assert (
        retention["task"] == "stsb"
        and retention["loss"] != retention["base_loss"]
        and "--retention stsb" in record.command
    )
    loaded, rows = models.load("embedded"), sources.load(task_files.get("stsb"), "embedded")
    lm_task = evaluation.harness_task(task_files.get("stsb"), rows)
    total = count = 0
    for row in rows.test.select(range(retention["rows"])):
        e = batches.language_example(loaded.tokenizer, *evaluation.prompt_and_answer(lm_task, row), 128, True)
        with torch.no_grad():
            logs = loaded.model(torch.tensor([e.ids])).logits[0, :-1].log_softmax(-1)
        total -= float(logs.gather(-1, torch.tensor(e.ids[1:])[:, None]).sum())
        count += len(e.ids) - 1
    assert retention["tokens"] == count and retention["base_loss"] == pytest.approx(total / count, abs=2e-2)


@pytest.mark.parametrize(
    ("request_options", "message"),
    [({"task": "sst2", "retention": "sst2"}, '"sst2" is trained on in this run'),
     ({"task": "sst2", "retention": "ssst2"}, 'unknown task "ssst2"'),
     ({"task": "stsb", "retention": "sst2"}, "--retention measures the loss on text")],
)  # fmt: skip
def test_retention_that_cannot_be(request_options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plan(Request("lora", **request_options))
