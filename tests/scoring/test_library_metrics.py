"""Metrics of the library evaluate: by a canonical name, where trusted, and then what they compute."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from peftzoo.errors import UserError
from peftzoo.records import store
from peftzoo.runs.plan import Plan, Request
from peftzoo.runs.run import run
from peftzoo.scoring import evaluation, library_metrics
from peftzoo.tasks import sources, task_files

MODULE = """
import datasets
import evaluate


class LengthGap(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        gaps = [abs(len(p) - len(r)) for p, r in zip(predictions, references)]
        return {"length_gap": sum(gaps) / len(gaps), "longest_gap": float(max(gaps))}
"""
"""A metric as the Hub has them: made up for this test, so that only the cache can give it."""


@pytest.fixture
def cached(tmp_path: Path, monkeypatch) -> Path:
    """`length_gap` in the library's module cache, and nothing else; no network."""
    import evaluate

    place = tmp_path / "modules" / "evaluate_modules" / "metrics" / "evaluate-metric--length_gap" / ("0" * 64)
    place.mkdir(parents=True)
    (place / "length_gap.py").write_text(MODULE)
    for folder in (place, *place.parents):
        if folder == tmp_path:
            break
        (folder / "__init__.py").touch()
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(
        evaluate.loading, "init_dynamic_modules", lambda: str(tmp_path / "modules" / "evaluate_modules")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [m for m in sys.modules if m.startswith("evaluate_modules")]:
        monkeypatch.delitem(sys.modules, name)
    library_metrics.load.cache_clear()
    yield tmp_path
    library_metrics.load.cache_clear()


def task_file(folder: Path, entry: dict, metric: str, base: str = "gsm8k") -> Path:
    """A task file that includes a built-in task and has one metric."""
    from peftzoo.tasks._includes import read

    raw = read(task_files.folder() / "gsm8k" / f"{base}.yaml")
    raw |= {"task": "own", "metric_list": [entry]}
    raw["metadata"]["peftzoo"] |= {"metric": metric, "also": []}
    raw.pop("filter_list", None)
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


ENTRY = {"metric": "length_gap", "hf_evaluate": True}


def test_a_library_metric_needs_trust(cached: Path) -> None:
    file = task_file(cached, ENTRY, "length_gap")
    with pytest.raises(UserError, match="--trust-task-code"):
        Plan(Request("none", str(file)))
    assert "--trust-task-code" in Plan(Request("none", str(file), trust_task_code=True)).command()


@pytest.mark.parametrize("metric", ["length_gap", "longest_gap"])
def test_a_trusted_run_is_scored_by_what_the_metric_returns(cached: Path, metric: str) -> None:
    """Against the same numbers by hand, from the answers on record; any returned number may be ranked."""
    file = task_file(cached, ENTRY, metric)
    asked = Request("none", str(file), trust_task_code=True, limit=5, max_new_tokens=6)
    record, path, _ = run(asked, cached / "out")
    assert record.status == "ok" and record.result.metric == metric, record.reason
    task = task_files.get(str(file))
    rows = sources.load(task, "embedded").test.select(range(5))
    lm_task = evaluation.harness_task(task, sources.Rows(None, rows))
    import gzip

    lines = gzip.decompress(path.with_suffix(".examples.jsonl.gz").read_bytes()).decode().splitlines()
    answers = {o["row"]: o["answer"][0] for o in map(json.loads, lines)}
    gaps = [abs(len(answers[i]) - len(str(lm_task.doc_to_target(row)))) for i, row in enumerate(rows)]
    assert record.result.value == pytest.approx(sum(gaps) / len(gaps))
    assert store.read(path).result == record.result


@pytest.mark.parametrize("name", ["./evil", "evil/evil.py", "evil.py", "../evil", "Evil", "owner/metric", ""])
def test_paths_are_no_metrics(cached: Path, name: str) -> None:
    file = task_file(cached, {"metric": name, "hf_evaluate": True}, name)
    with pytest.raises(UserError, match="no canonical name"):
        Plan(Request("none", str(file), trust_task_code=True))


@pytest.mark.parametrize("place", ["evil/evil.py", "evil.py"])
def test_a_folder_of_the_same_name_is_never_run(cached: Path, monkeypatch, place: str) -> None:
    script = cached / "here" / place
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit('this machine runs it')")
    monkeypatch.chdir(cached / "here")
    with pytest.raises(UserError, match="run the command from another folder"):
        library_metrics.load("evil")


def test_a_metric_of_neither_is_refused_before_lm_eval_searches(cached: Path, monkeypatch) -> None:
    """lm-eval would look for it in the library, and so run a folder of this name."""
    (cached / "evil").mkdir()
    (cached / "evil" / "evil.py").write_text("raise SystemExit('this machine runs it')")
    monkeypatch.chdir(cached)
    task = task_files.get(str(task_file(cached, {"metric": "evil"}, "evil")))
    with pytest.raises(UserError, match=r'unknown metric "evil".*hf_evaluate: true'):
        evaluation.harness_task(task, sources.load(task, "embedded"))


def test_what_cannot_be_loaded_says_why(cached: Path) -> None:
    with pytest.raises(UserError, match=r'"no_such_metric".*cannot be loaded.*check the name'):
        library_metrics.load("no_such_metric")


def test_a_metric_that_returns_other_names_says_which(cached: Path) -> None:
    file = task_file(cached, ENTRY, "gap")
    request = Request("none", str(file), trust_task_code=True, limit=2, max_new_tokens=2)
    with pytest.raises(UserError, match='"gap" is not among its results: length_gap, longest_gap'):
        run(request, cached / "out")


def test_choices_have_metrics_of_lm_eval_alone(cached: Path) -> None:
    task = task_files.get("piqa")
    changed = task.model_copy(update={"metric_list": [ENTRY]})
    with pytest.raises(UserError, match="a task with choices"):
        library_metrics.check_trusted(changed, trusted=True)


def test_a_head_may_have_one(monkeypatch) -> None:
    calls = []

    def compute(predictions, references):
        calls.append((predictions, references))
        return {"own": sum(p == r for p, r in zip(predictions, references, strict=True)) / len(predictions)}

    monkeypatch.setattr(library_metrics, "load", lambda name: compute)
    assert library_metrics.compute_head("own", [1.0, 0.0], [1.0, 1.0]) == 0.5 and calls == [([1, 0], [1, 1])]
    assert library_metrics.compute_head("own", [0.5, 0.25], [0.5, 1.0]) == 0.5
    with pytest.raises(UserError, match='no number called "other"'):
        library_metrics.compute_head("other", [1.0], [1.0])


def test_nothing_is_loaded_for_other_tasks() -> None:
    import subprocess

    code = ("import sys; from peftzoo.tasks import task_files, sources;"
            "from peftzoo.scoring import evaluation; t = task_files.get('gsm8k');"
            "evaluation.harness_task(t, sources.load(t, 'embedded'));"
            "assert 'evaluate' not in sys.modules")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
