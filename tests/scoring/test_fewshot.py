"""Few-shot examples: those of a row follow from the row, whatever was made, scored or drawn before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from peftzoo.runs.plan import Request
from peftzoo.runs.run import run
from peftzoo.scoring import evaluation
from peftzoo.tasks import _includes, sources, task_files
from peftzoo.tasks.sources import Rows

BASES = {"glue/sst2": "validation", "gsm8k/gsm8k": "test"}


def fewshot_task(folder: Path, base: str, name: str = "shots", **changes) -> str:
    """A built-in task with two examples in the prompt, drawn by lm-eval's default sampler."""
    raw = _includes.read(task_files.folder() / f"{base}.yaml") | {"task": name, "num_fewshot": 2}
    raw |= {"fewshot_split": "train"} | changes
    raw["metadata"]["peftzoo"]["embedded"] |= {"train": 30, BASES[base]: 12}
    raw["metadata"]["peftzoo"]["overlap"] = "record"
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(raw))
    return str(file)


def prompts(task: task_files.Task, rows: Rows, name: str | None = None) -> dict[int, list]:
    """Row number -> the prompts with which lm-eval would ask for its scores."""
    lm_task = evaluation.harness_task(task, rows, name=name)
    lm_task.build_all_requests(limit=None, rank=0, world_size=1)
    found: dict[int, list] = {}
    for instance in lm_task.instances:
        found.setdefault(lm_task.row_ids[instance.doc_id], []).append(instance.args[0])
    return found


@pytest.mark.parametrize("base", BASES)
def test_a_row_is_always_asked_with_the_same_examples(tmp_path, base: str) -> None:
    """Again, with other rows or none before it, in a pack, in training, and after other draws."""
    task = task_files.get(fewshot_task(tmp_path, base))
    rows = sources.load(task, "embedded")
    first = prompts(task, rows)
    assert len(first) == 12
    part = Rows(None, rows.test.select([7, 2, 5]), fewshot=rows.fewshot)
    other = task_files.get(fewshot_task(tmp_path, base, "other", num_fewshot=3))
    for attempt in range(3):
        random.seed(attempt)
        prompts(other, sources.load(other, "embedded"))
        assert prompts(task, rows, name=f"shots@{attempt}") == first
        assert prompts(task, part) == {i: first[i] for i in (7, 2, 5)}
    lm_task = evaluation.harness_task(task, rows)
    for i in (4, 0, 4):
        assert evaluation.prompt_and_answer(lm_task, rows.test[i])[0] == first[i][0]
    shown = {p[0].rpartition("\n\n")[0] for p in first.values()}
    assert len(shown) > 6, "each row draws its own examples"


def test_first_n_shows_all_rows_the_same(tmp_path) -> None:
    task = task_files.get(fewshot_task(tmp_path, "glue/sst2", fewshot_config={"sampler": "first_n"}))
    rows = sources.load(task, "embedded")
    shown = {p[0].rpartition("\n\n")[0] for p in prompts(task, rows).values()}
    assert len(shown) == 1 and rows.fewshot[0]["sentence"].strip() in shown.pop()


def test_examples_from_the_scored_split_leave_the_row_itself_out(tmp_path) -> None:
    """Only the given rows are scored, though examples come from the whole split."""
    task = task_files.get(fewshot_task(tmp_path, "gsm8k/gsm8k", fewshot_split="test"))
    rows = sources.load(task, "embedded")
    rows.test = rows.test.select([3, 8])
    assert len(rows.fewshot) == 12
    found = prompts(task, rows)
    assert [*found] == [3, 8]
    for number, (prompt, *_) in found.items():
        assert prompt.count(rows.fewshot[number]["question"].strip()) == 1


def test_the_same_run_gives_the_same_answers(tmp_path) -> None:
    """Once more, and after a run of another task."""
    task, other = (fewshot_task(tmp_path, "glue/sst2", name) for name in ("shots", "other"))
    first, *_ = run(Request("none", task, limit=6), tmp_path / "a")
    run(Request("none", other, limit=5), tmp_path / "b")
    again, *_ = run(Request("none", task, limit=6), tmp_path / "b")
    assert first.status == "ok" and first.examples == again.examples and first.id == again.id
