"""A row's number leads back to the same row of its source, wherever rows are drawn, cut off or left out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import yaml

from peftzoo.runs.packs import run_packs
from peftzoo.runs.plan import Plan, Request
from peftzoo.runs.run import run
from peftzoo.tasks import _includes, row_numbers, run_data, sources, splits, task_files
from peftzoo.tasks.schema import Protocol, TaskGroup


def whole_splits(task: task_files.Task) -> dict[str, list[dict]]:
    """Every split of the task as its generator makes it."""
    made, spec = task_files.generator(task), task.extra.embedded
    counts = {task.test_split: spec.test, task.validation_split: spec.validation}
    counts |= {task.training_split: spec.train}
    return {s: made(s, n, sources.EMBEDDED_SEED) for s, n in counts.items() if s and n}


def check(dataset, whole: list[dict]) -> None:
    """Each row's number is the place of that row in the whole split, and no number occurs twice."""
    numbers = row_numbers.of(dataset)
    assert len({*numbers}) == len(numbers) == len(dataset) > 0
    for number, row in zip(numbers, row_numbers.without(dataset), strict=True):
        assert {k: row[k] for k in whole[number]} == whole[number]


CUTS = {
    "nothing": {},
    "limit": {"limit": 7},
    "scored rows choose": {"selection": Protocol(choose="scored")},
    "a share chooses": {"selection": Protocol(choose=0.5)},
    "a number chooses": {"selection": Protocol(choose=11)},
    "a share chooses, limit": {"selection": Protocol(choose=0.5), "limit": 7},
    "held out": {"hold_out": (20, 3)},
    "held out, a share chooses, limit": {"hold_out": (20, 3), "selection": Protocol(choose=0.5), "limit": 7},
}


def task_group(name: str) -> TaskGroup:
    """The task or group, or `wnli+rte`: two tasks that are trained together, each on rows of its own."""
    if "+" not in name:
        return task_files.task_group(name)
    members = tuple(map(task_files.get, name.split("+")))
    return TaskGroup("pair", 1.0, task_files.task_group("mnli").about, members)


@pytest.mark.parametrize("name", ["sst2", "gsm8k", "mnli", "wnli+rte"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_number_leads_back_to_its_row(name: str, cut: str) -> None:
    """For one task and a group of tasks; trained, scored and selecting rows."""
    if name == "mnli" and "hold_out" in CUTS[cut]:
        pytest.skip("its members share their training rows, which a search may not score")
    group = task_group(name)
    data = splits.split(run_data.load(group, "embedded", None, trains=True), seed=5, **CUTS[cut])
    for eval_set in data.eval_sets:
        whole = whole_splits(eval_set.task)
        split = eval_set.task.training_split if "hold_out" in CUTS[cut] else eval_set.task.eval_split
        check(eval_set.rows.test, whole[split])
        if eval_set.selection_rows is not None:
            check(eval_set.selection_rows, whole[split])
    for train_set in data.train_sets:
        check(train_set.rows, whole_splits(train_set.task)[train_set.task.training_split])


@pytest.mark.parametrize("cut", CUTS)
def test_a_number_leads_back_through_a_cut_of_the_only_split(tmp_path, cut: str) -> None:
    """`cut` shuffles the rows of one split into several; rows of equal text stay together."""
    task = cut_task()
    path, config = task.extra.mirror or (task.dataset_path, task.dataset_name)
    place = tmp_path / path.replace("/", "__") / (config or "default")
    place.mkdir(parents=True)
    lines = [{"input": f"question {i // 2 if i < 20 else i} ?", "target": "Yes"} for i in range(190)]
    (place / f"{task.extra.cut.of}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    data = run_data.load(task_files.task_group(task.name), "mirror", tmp_path, trains=True)
    data = splits.split(data, seed=5, **CUTS[cut])
    sets = [data.eval_sets[0].rows.test, data.eval_sets[0].selection_rows, data.train_sets[0].rows]
    for dataset in [s for s in (*sets, data.train_sets[0].fewshot) if s is not None]:
        assert [lines[i]["input"] for i in row_numbers.of(dataset)] == dataset["input"][:]
        assert len({*row_numbers.of(dataset)}) == len(dataset)
    if not CUTS[cut]:
        scored, trained = row_numbers.of(sets[0]), row_numbers.of(sets[2])
        assert not {*scored} & {*trained} and scored != [*range(len(scored))]


def cut_task() -> task_files.Task:
    """A built-in task whose rows are cut from one split, with few-shot examples."""
    return next(t for t in map(task_files.get, task_files.tasks()) if t.extra.cut and t.num_fewshot)


def small_task(folder: Path, base: str = "glue/sst2", **embedded: int) -> str:
    """A built-in task with few embedded rows, in a file of its own."""
    raw = _includes.read(task_files.folder() / f"{base}.yaml")
    raw["task"] = "small"
    raw["metadata"]["peftzoo"]["embedded"] |= {"train": 48, "validation": 24} | embedded
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(raw))
    return str(file)


def outcomes(path: Path) -> dict[int, dict]:
    lines = gzip.decompress(path.with_suffix(".examples.jsonl.gz").read_bytes()).decode().splitlines()
    return {o["row"]: o for o in map(json.loads, lines)}


@pytest.mark.parametrize("base", ["glue/sst2", "glue/stsb"])
def test_a_row_has_one_number_and_one_answer_under_every_protocol(tmp_path, base: str) -> None:
    """Choices and a head: half of the rows, the first ones and all of them give a row the same outcome."""
    task, train = small_task(tmp_path, base), {"steps": 1, "batch_size": 2}
    requests = {
        "all": Request("lora", task, train=train),
        "first": Request("lora", task, train=train, limit=5),
        "half": Request("lora", task, train=train, protocol="clean", seed=0),
    }
    found = {k: outcomes(run(r, tmp_path)[1]) for k, r in requests.items()}
    assert [*found["all"]] == [*range(24)] and [*found["first"]] == [0, 1, 2, 3, 4]
    (eval_set,) = Plan(requests["half"]).eval_sets
    assert [*found["half"]] == row_numbers.of(eval_set.rows.test) != [*range(12)]
    every = [o for part in ("first", "half") for o in found[part].items()]
    for number, outcome in every:
        assert outcome["answer"] == pytest.approx(found["all"][number]["answer"], abs=5e-3)


@pytest.mark.long
def test_runs_of_a_pack_have_the_same_numbers(tmp_path) -> None:
    task = small_task(tmp_path)
    requests = [Request("lora", task, seed=s, train={"steps": 1, "batch_size": 2}, limit=4) for s in (0, 1)]
    held_out = [Request("lora", task, train={"steps": 1, "batch_size": 2}, hold_out=(6, s)) for s in (0, 1)]
    for together in (False, True):
        done = run_packs(requests, tmp_path / str(together), size=2, score_together=together)
        assert [[*outcomes(path)] for _, path, _ in done] == [[0, 1, 2, 3]] * 2
    for request in held_out:
        (eval_set,) = Plan(request).eval_sets
        assert [*outcomes(run(request, tmp_path)[1])] == row_numbers.of(eval_set.rows.test)


def test_rows_without_the_column_are_counted() -> None:
    import datasets

    plain = datasets.Dataset.from_list([{"a": 1}, {"a": 2}])
    assert row_numbers.of(plain) == [0, 1] and row_numbers.without(plain) is plain
