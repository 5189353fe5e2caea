"""Metrics of which less is better: in task files, in records, where a checkpoint is chosen, in tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from peftzoo.cli import _run_tables
from peftzoo.errors import UserError
from peftzoo.records import store
from peftzoo.records.schema import Score, mean
from peftzoo.runs.packs import run_packs
from peftzoo.runs.plan import Plan, Request
from peftzoo.runs.run import run
from peftzoo.tasks import _includes, task_files
from tests.boards.test_tables import make

BRIER = {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}


def task_file(
    folder: Path, entries: list[dict], metric: str, base: str = "glue/sst2", name: str = "own"
) -> str:
    """A built-in task with other metrics, of which `metric` is ranked, and few embedded rows."""
    raw = _includes.read(task_files.folder() / f"{base}.yaml") | {"task": name, "metric_list": entries}
    block = raw["metadata"]["peftzoo"]
    block |= {"metric": metric, "also": []}
    block["embedded"] |= {"train": 40, "validation": 20}
    (file := folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    return str(file)


DIRECTIONS = {
    "higher, said": ([{"metric": "acc", "higher_is_better": True}], "acc", True),
    "lower, said": ([BRIER], "brier_score", False),
    "lower, said of accuracy": ([{"metric": "acc", "higher_is_better": False}], "acc", False),
    "lower, by lm-eval": ([{"metric": "brier_score"}], "brier_score", False),
    "higher, by lm-eval": ([{"metric": "acc"}], "acc", True),
    "of the ranked one": ([BRIER, {"metric": "acc"}], "acc", True),
    "with a filter": ([{"metric": "ter"}], "ter,strict", False),
    "of the library": ([{"metric": "wer", "hf_evaluate": True, "higher_is_better": False}], "wer", False),
    "another result of the library's": (
        [{"metric": "a", "hf_evaluate": True, "higher_is_better": False}], "b", False,
    ),
    "not of the library's": (
        [{"metric": "a", "hf_evaluate": True, "higher_is_better": False}, {"metric": "acc"}], "acc", True,
    ),
    "of the library, not said": ([{"metric": "wer", "hf_evaluate": True}], "wer", True),
    "of a head alone": ([{"metric": "acc", "higher_is_better": False}], "pearson", True),
}  # fmt: skip


@pytest.mark.parametrize("case", DIRECTIONS)
def test_the_direction_of_the_ranked_metric(tmp_path, case: str) -> None:
    entries, metric, expected = DIRECTIONS[case]
    assert task_files.get(task_file(tmp_path, entries, metric)).higher_is_better is expected


def test_a_direction_is_true_or_false(tmp_path) -> None:
    file = task_file(tmp_path, [{"metric": "acc", "higher_is_better": "no"}], "acc")
    with pytest.raises(UserError, match="higher_is_better is true or false"):
        task_files.get(file)


@pytest.mark.parametrize("name", task_files.tasks())
def test_of_every_built_in_task_more_is_better(name: str) -> None:
    assert task_files.get(name).higher_is_better


@pytest.mark.parametrize("lower", [(), ("a",), ("a", "b")])
def test_the_direction_of_a_mean(lower: tuple) -> None:
    scores = {n: Score(metric="m", higher_is_better=n not in lower, value=1, rows=1) for n in "ab"}
    assert mean(scores).higher_is_better is (len(lower) < 2)


def test_a_group_of_both_directions_is_refused(tmp_path, monkeypatch) -> None:
    down = task_files.get(task_file(tmp_path, [BRIER], "brier_score"))
    up, group = task_files.get("sst2"), task_files.task_group("mnli")
    mixed = group.__class__("mixed", 1.0, group.about, (up, down))
    monkeypatch.setattr(task_files, "task_group", lambda name: mixed)
    named = r'"mixed" cannot .* higher .* acc of "sst2", lower .* brier_score of "own"'
    with pytest.raises(UserError, match=named) as error:
        Plan(Request("lora", "mixed"))
    assert "\n" not in str(error.value) and str(error.value).endswith("run them one by one")


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["best-epoch", "clean"])
def test_the_checkpoint_with_the_lowest_loss_is_chosen(tmp_path, protocol: str) -> None:
    """Of the same runs, ranked by accuracy the highest one is."""
    train = {"steps": 10, "batch_size": 4, "lr": 0.05}
    chosen = {}
    for metric, better in (("brier_score", min), ("acc", max)):
        task = task_file(tmp_path, [BRIER, {"metric": "acc", "higher_is_better": True}], metric)
        record, path, _ = run(Request("lora", task, protocol=protocol, train=train), tmp_path / metric)
        assert record.status == "ok", record.reason
        scores = {int(step): value for step, value in record.chosen["scores"].items()}
        assert len({*scores.values()}) > 1 and scores[record.chosen["step"]] == better(scores.values())
        assert record.result.higher_is_better is (better is max) and store.read(path) == record
        chosen[metric] = scores
    assert [*chosen["acc"]] == [*chosen["brier_score"]]


@pytest.mark.long
def test_runs_of_a_pack_have_the_direction_too(tmp_path) -> None:
    task = task_file(tmp_path, [BRIER], "brier_score")
    requests = [Request("lora", task, seed=s, train={"steps": 1, "batch_size": 2}, limit=3) for s in (0, 1)]
    for record, _, _ in run_packs(requests, tmp_path, size=2, score_together=True):
        assert record.score.higher_is_better is record.merged_score.higher_is_better is False


@pytest.mark.parametrize("higher", [True, False])
def test_the_best_mean_stands_first(capsys, higher: bool) -> None:
    records = []
    for i, (method, value) in enumerate((("lora", 0.4), ("dora", 0.2), ("vera", 0.6))):
        score = Score(metric="loss", higher_is_better=higher, value=value, rows=10)
        records += [make(method, id=f"{i}" * 12, seed=s, score=score) for s in (0, 1)]
    _run_tables._print_means("t", records, [])
    out = capsys.readouterr().out
    order = sorted(("lora", "dora", "vera"), key=out.index)
    assert order == (["vera", "lora", "dora"] if higher else ["dora", "lora", "vera"])
    assert ("lower is better" in out) is not higher
